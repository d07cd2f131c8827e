"""Models and tokenizers: from a name, a hub id, a folder or a URI to a folder on this node, and to a tokenizer."""

"""The plugins that ship with llmft, registered like a stranger's."""

"""A dataset, a storage backend and a strategy for llmft: a module each, found through entry points."""

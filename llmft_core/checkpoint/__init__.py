"""Checkpoints: export in Hugging Face layout, verification, manifest, publishing."""

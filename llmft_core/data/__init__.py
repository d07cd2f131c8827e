"""Rows → conversations → encoded examples → a token cache → micro-batches."""

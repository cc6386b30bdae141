"""Embeddings of files and texts, and what is most like a query among them."""

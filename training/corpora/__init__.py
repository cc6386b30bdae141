"""Generated corpora, for demos and tests."""

"""In other people's code: `transformers`, `timm`, `sentence_transformers`, each by its name."""

"""The ops in other people's models: `transformers` and `timm`, each imported by its name."""

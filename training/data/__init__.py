"""From annotation files and media to batches."""

RESIZES = ("antialias", "official")
"""How pictures become the model's size."""

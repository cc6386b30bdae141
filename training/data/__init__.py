"""From annotation files and media to batches."""

RESIZES = ("antialias", "official")
"""How pictures become the model's size."""
TEST_SAMPLINGS = ("middle", "ends")
"""Which frames of a video are a clip in evaluation."""
STRONGEST = 10
"""Of RandAugment's changes."""

"""SViTT on Frozen."""

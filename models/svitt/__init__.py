"""SViTT."""

"""What systems share: towers, fusion layers, heads, losses, and how weights are read."""

"""Weights of other projects: released SViTT and Singularity checkpoints, BEiT and BERT."""

from svitt_ops.models.parts.conversion import (
    RELEASED,
    Conversion,
    convert_into,
    load_beit,
    load_bert,
)
from svitt_ops.models.svitt.convert import load_official

__all__ = ["RELEASED", "Conversion", "convert_into", "load_beit", "load_bert", "load_official"]

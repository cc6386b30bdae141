"""SViTT on Frozen: two towers that meet in the contrastive loss only."""

from svitt_ops.models.frozen.configuration import FrozenConfig
from svitt_ops.models.frozen.convert import load_official
from svitt_ops.models.frozen.model import FrozenForRetrieval
from svitt_ops.models.parts.system import System

SYSTEM = System(
    config=FrozenConfig,
    base=FrozenForRetrieval,
    models={"pretraining": FrozenForRetrieval, "retrieval": FrozenForRetrieval},
    load_official=load_official,
)
__all__ = ["SYSTEM", "FrozenConfig", "FrozenForRetrieval", "load_official"]

"""COOKIE: contrastive pretraining of two streams that share weights (ICCV 2021)."""

from svitt_ops.models.cookie.configuration import COOKIEConfig
from svitt_ops.models.cookie.convert import load_resnet
from svitt_ops.models.cookie.model import (
    COOKIEForHashing,
    COOKIEForPreTraining,
    COOKIEForRetrieval,
    COOKIEModel,
)
from svitt_ops.models.parts.conversion import RELEASED, load_bert
from svitt_ops.models.parts.system import Source, System

SYSTEM = System(
    config=COOKIEConfig,
    base=COOKIEModel,
    models={
        "pretraining": COOKIEForPreTraining,
        "retrieval": COOKIEForRetrieval,
        "hashing": COOKIEForHashing,
    },
    sources={
        "resnet": Source(released=RELEASED["resnet"], load=load_resnet, takes_files=True),
        "bert": Source(released=RELEASED["bert"], load=load_bert),
    },
)
__all__ = [
    "SYSTEM",
    "COOKIEConfig",
    "COOKIEForHashing",
    "COOKIEForPreTraining",
    "COOKIEForRetrieval",
    "COOKIEModel",
    "load_resnet",
]

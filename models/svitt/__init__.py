"""SViTT: sparse video-text transformers (CVPR 2023)."""

from svitt_ops.models.parts.conversion import RELEASED, load_beit, load_bert
from svitt_ops.models.parts.system import Source, System
from svitt_ops.models.svitt import old_weights
from svitt_ops.models.svitt.configuration import SViTTConfig
from svitt_ops.models.svitt.convert import TASKS, load_official
from svitt_ops.models.svitt.model import (
    SViTTForMultipleChoice,
    SViTTForPreTraining,
    SViTTForQuestionAnswering,
    SViTTForRetrieval,
    SViTTModel,
)

old_weights.register()

SYSTEM = System(
    config=SViTTConfig,
    base=SViTTModel,
    models=TASKS,
    load_official=load_official,
    sources={
        "beit": Source(released=RELEASED["beit"], load=load_beit),
        "bert": Source(released=RELEASED["bert"], load=load_bert),
    },
)
__all__ = [
    "SYSTEM",
    "SViTTConfig",
    "SViTTForMultipleChoice",
    "SViTTForPreTraining",
    "SViTTForQuestionAnswering",
    "SViTTForRetrieval",
    "SViTTModel",
    "load_official",
]

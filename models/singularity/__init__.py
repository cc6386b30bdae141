"""Singularity: a single-frame baseline of SViTT, and its second stage over time (ACL 2023)."""

from svitt_ops.models.parts.conversion import RELEASED, load_beit, load_bert
from svitt_ops.models.parts.system import Source, System
from svitt_ops.models.singularity.configuration import SingularityConfig
from svitt_ops.models.singularity.convert import TASKS, load_official
from svitt_ops.models.singularity.model import (
    SingularityForMultipleChoice,
    SingularityForPreTraining,
    SingularityForQuestionAnswering,
    SingularityForRetrieval,
    SingularityModel,
)

SYSTEM = System(
    config=SingularityConfig,
    base=SingularityModel,
    models=TASKS,
    load_official=load_official,
    sources={
        "beit": Source(released=RELEASED["beit"], load=load_beit),
        "bert": Source(released=RELEASED["bert"], load=load_bert),
    },
)
__all__ = [
    "SYSTEM",
    "SingularityConfig",
    "SingularityForMultipleChoice",
    "SingularityForPreTraining",
    "SingularityForQuestionAnswering",
    "SingularityForRetrieval",
    "SingularityModel",
    "load_official",
]

"""ALBEF: align before fuse, taught by momentum distillation (NeurIPS 2021)."""

from svitt_ops.models.albef.configuration import ALBEFConfig
from svitt_ops.models.albef.convert import TASKS, load_official
from svitt_ops.models.albef.model import (
    ALBEFForPreTraining,
    ALBEFForQuestionAnswering,
    ALBEFForRetrieval,
    ALBEFForTextAssignment,
    ALBEFForVisualEntailment,
    ALBEFForVisualReasoning,
    ALBEFModel,
)
from svitt_ops.models.parts.conversion import RELEASED, load_bert, load_vit
from svitt_ops.models.parts.system import Source, System

SYSTEM = System(
    config=ALBEFConfig,
    base=ALBEFModel,
    models=TASKS,
    load_official=load_official,
    sources={
        "vit": Source(released=RELEASED["vit"], load=load_vit),
        "bert": Source(released=RELEASED["bert"], load=load_bert),
    },
)
__all__ = [
    "SYSTEM",
    "ALBEFConfig",
    "ALBEFForPreTraining",
    "ALBEFForQuestionAnswering",
    "ALBEFForRetrieval",
    "ALBEFForTextAssignment",
    "ALBEFForVisualEntailment",
    "ALBEFForVisualReasoning",
    "ALBEFModel",
    "load_official",
]

"""SoftMask: ALBEF with softly masked images and a focal contrastive loss (CVPR 2023)."""

from svitt_ops.models.parts.conversion import RELEASED, load_bert, load_vit
from svitt_ops.models.parts.system import Source, System
from svitt_ops.models.softmask.configuration import SoftMaskConfig
from svitt_ops.models.softmask.model import (
    TASKS,
    SoftMaskForPreTraining,
    SoftMaskForQuestionAnswering,
    SoftMaskForRetrieval,
    SoftMaskForVisualEntailment,
    SoftMaskForVisualReasoning,
    SoftMaskModel,
)

SYSTEM = System(
    config=SoftMaskConfig,
    base=SoftMaskModel,
    models=TASKS,
    sources={
        "vit": Source(released=RELEASED["vit"], load=load_vit),
        "bert": Source(released=RELEASED["bert"], load=load_bert),
    },
)
__all__ = [
    "SYSTEM",
    "SoftMaskConfig",
    "SoftMaskForPreTraining",
    "SoftMaskForQuestionAnswering",
    "SoftMaskForRetrieval",
    "SoftMaskForVisualEntailment",
    "SoftMaskForVisualReasoning",
    "SoftMaskModel",
]

"""SIMLA: one encoder, aligned at several levels with images (ECCV 2022)."""

from svitt_ops.models.parts.conversion import RELEASED, load_bert, load_vit
from svitt_ops.models.parts.system import Source, System
from svitt_ops.models.simla.configuration import SIMLAConfig
from svitt_ops.models.simla.convert import TASKS, load_official
from svitt_ops.models.simla.model import (
    SIMLAForPreTraining,
    SIMLAForQuestionAnswering,
    SIMLAForRetrieval,
    SIMLAForVisualEntailment,
    SIMLAForVisualReasoning,
    SIMLAModel,
    use_dalle,
)

SYSTEM = System(
    config=SIMLAConfig,
    base=SIMLAModel,
    models=TASKS,
    load_official=load_official,
    sources={
        "vit": Source(released=RELEASED["vit"], load=load_vit),
        "bert": Source(released=RELEASED["bert"], load=load_bert),
        "dalle": Source(released="DALL-E's encoder", load=use_dalle, is_file=True),
    },
)
__all__ = [
    "SYSTEM",
    "SIMLAConfig",
    "SIMLAForPreTraining",
    "SIMLAForQuestionAnswering",
    "SIMLAForRetrieval",
    "SIMLAForVisualEntailment",
    "SIMLAForVisualReasoning",
    "SIMLAModel",
    "load_official",
    "use_dalle",
]

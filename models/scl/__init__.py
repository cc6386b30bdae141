"""SCL: vision-language pretraining with semantic completion learning (CVPR 2023)."""

from svitt_ops.models.parts.conversion import RELEASED
from svitt_ops.models.parts.system import Source, System
from svitt_ops.models.scl.classification import SCLForQuestionAnswering, SCLForVisualReasoning
from svitt_ops.models.scl.configuration import SCLConfig
from svitt_ops.models.scl.convert import TASKS, load_clip, load_official, load_roberta
from svitt_ops.models.scl.model import SCLForPreTraining, SCLForRetrieval, SCLModel

SYSTEM = System(
    config=SCLConfig,
    base=SCLModel,
    models=TASKS,
    load_official=load_official,
    official_sep=True,
    sources={
        "clip": Source(
            released=RELEASED["clip_vision_model"], load=load_clip, types=("clip_vision_model",)
        ),
        "roberta": Source(released=RELEASED["roberta"], load=load_roberta),
    },
)
__all__ = [
    "SYSTEM",
    "SCLConfig",
    "SCLForPreTraining",
    "SCLForQuestionAnswering",
    "SCLForRetrieval",
    "SCLForVisualReasoning",
    "SCLModel",
    "load_official",
]

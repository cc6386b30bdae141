"""Sparse video-text transformers: definitions and losses over `svitt_ops`."""

from svitt_ops.models import convert
from svitt_ops.models.albef.configuration import ALBEFConfig
from svitt_ops.models.albef.model import (
    ALBEFForPreTraining,
    ALBEFForQuestionAnswering,
    ALBEFForRetrieval,
    ALBEFForTextAssignment,
    ALBEFForVisualEntailment,
    ALBEFForVisualReasoning,
    ALBEFModel,
)
from svitt_ops.models.cookie.configuration import COOKIEConfig
from svitt_ops.models.cookie.model import (
    COOKIEForHashing,
    COOKIEForPreTraining,
    COOKIEForRetrieval,
    COOKIEModel,
)
from svitt_ops.models.frozen.configuration import FrozenConfig
from svitt_ops.models.frozen.model import FrozenForRetrieval
from svitt_ops.models.parts.expansion import change_image_size, expand_frames
from svitt_ops.models.parts.outputs import (
    AnswerRanking,
    ClassificationOutput,
    FusionOutput,
    MultipleChoiceOutput,
    QuestionAnsweringOutput,
    TextOutput,
    VideoOutput,
)
from svitt_ops.models.parts.outputs import PreTrainingOutput as SViTTPreTrainingOutput
from svitt_ops.models.parts.token_order import token_order
from svitt_ops.models.scl.classification import SCLForQuestionAnswering, SCLForVisualReasoning
from svitt_ops.models.scl.configuration import SCLConfig
from svitt_ops.models.scl.model import SCLForPreTraining, SCLForRetrieval, SCLModel
from svitt_ops.models.simla.configuration import SIMLAConfig
from svitt_ops.models.simla.model import (
    SIMLAForPreTraining,
    SIMLAForQuestionAnswering,
    SIMLAForRetrieval,
    SIMLAForVisualEntailment,
    SIMLAForVisualReasoning,
    SIMLAModel,
)
from svitt_ops.models.singularity.configuration import SingularityConfig
from svitt_ops.models.singularity.model import (
    SingularityForMultipleChoice,
    SingularityForPreTraining,
    SingularityForQuestionAnswering,
    SingularityForRetrieval,
    SingularityModel,
)
from svitt_ops.models.softmask.configuration import SoftMaskConfig
from svitt_ops.models.softmask.model import (
    SoftMaskForPreTraining,
    SoftMaskForQuestionAnswering,
    SoftMaskForRetrieval,
    SoftMaskForVisualEntailment,
    SoftMaskForVisualReasoning,
    SoftMaskModel,
)
from svitt_ops.models.svitt.configuration import SViTTConfig
from svitt_ops.models.svitt.model import (
    SViTTForMultipleChoice,
    SViTTForPreTraining,
    SViTTForQuestionAnswering,
    SViTTForRetrieval,
    SViTTModel,
)
from svitt_ops.models.svitt.sparsity import EdgeCount, SparsityRow, edge_count, sparsity_table
from svitt_ops.models.systems import register

register()

__all__ = [
    "ALBEFConfig",
    "ALBEFForPreTraining",
    "ALBEFForQuestionAnswering",
    "ALBEFForRetrieval",
    "ALBEFForTextAssignment",
    "ALBEFForVisualEntailment",
    "ALBEFForVisualReasoning",
    "ALBEFModel",
    "AnswerRanking",
    "COOKIEConfig",
    "COOKIEForHashing",
    "COOKIEForPreTraining",
    "COOKIEForRetrieval",
    "COOKIEModel",
    "ClassificationOutput",
    "EdgeCount",
    "FrozenConfig",
    "FrozenForRetrieval",
    "FusionOutput",
    "MultipleChoiceOutput",
    "QuestionAnsweringOutput",
    "SCLConfig",
    "SCLForPreTraining",
    "SCLForQuestionAnswering",
    "SCLForRetrieval",
    "SCLForVisualReasoning",
    "SCLModel",
    "SIMLAConfig",
    "SIMLAForPreTraining",
    "SIMLAForQuestionAnswering",
    "SIMLAForRetrieval",
    "SIMLAForVisualEntailment",
    "SIMLAForVisualReasoning",
    "SIMLAModel",
    "SViTTConfig",
    "SViTTForMultipleChoice",
    "SViTTForPreTraining",
    "SViTTForQuestionAnswering",
    "SViTTForRetrieval",
    "SViTTModel",
    "SViTTPreTrainingOutput",
    "SingularityConfig",
    "SingularityForMultipleChoice",
    "SingularityForPreTraining",
    "SingularityForQuestionAnswering",
    "SingularityForRetrieval",
    "SingularityModel",
    "SoftMaskConfig",
    "SoftMaskForPreTraining",
    "SoftMaskForQuestionAnswering",
    "SoftMaskForRetrieval",
    "SoftMaskForVisualEntailment",
    "SoftMaskForVisualReasoning",
    "SoftMaskModel",
    "SparsityRow",
    "TextOutput",
    "VideoOutput",
    "change_image_size",
    "convert",
    "edge_count",
    "expand_frames",
    "sparsity_table",
    "token_order",
]

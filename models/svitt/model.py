"""SViTT: a sparse video tower, a text tower, fusion layers over both, and a model for each task.

Source: SViTT (CVPR 2023).
"""

from __future__ import annotations

from svitt_ops.models.parts.answers import AnswersQuestions
from svitt_ops.models.parts.choices import ChoosesTexts
from svitt_ops.models.parts.fused_towers import FusedTowers
from svitt_ops.models.parts.pairs import LearnsFromPairs, MatchesPairs
from svitt_ops.models.svitt.configuration import SViTTConfig


class SViTTModel(FusedTowers):
    """The towers and the fusion layers of SViTT."""

    config_class = SViTTConfig
    config: SViTTConfig


class SViTTForRetrieval(SViTTModel, MatchesPairs):
    """SViTT with a learned temperature and the match head."""


class SViTTForPreTraining(SViTTForRetrieval, LearnsFromPairs):
    """SViTT with a learned temperature and the heads of VTC, VTM and MLM."""


class SViTTForMultipleChoice(SViTTForRetrieval, ChoosesTexts):
    """The retrieval model with `choose`; it is trained as that is, on pairs."""


class SViTTForQuestionAnswering(SViTTModel, AnswersQuestions):
    """SViTT with an answer decoder instead of the heads that compare clips and texts."""

"""The head that predicts masked words from the fusion layers."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from svitt_ops.models.parts.fused_towers import FusedTowers
from svitt_ops.models.parts.heads import MaskedTokenHead


class PredictsWords(FusedTowers):
    """The towers, the fusion layers and the head for masked words."""

    def build(self, config: Any) -> None:
        super().build(config)
        self.token_head = MaskedTokenHead(config)

    def word_logits(
        self, input_ids: Tensor, attention_mask: Tensor, video_states: Tensor
    ) -> Tensor:
        """Logits of the pieces at every place of texts, ``(batch, tokens, vocab_size)``.

        Args:
            input_ids: ``(batch, tokens)``, some of them masked.
            attention_mask: ``(batch, tokens)``, 0 at padding.
            video_states: ``(batch, 1 + n, hidden_size)`` of `encode_video`.
        """
        masked = self.text(input_ids, attention_mask)
        fused = self.fuse(masked, attention_mask, video_states).states
        return cast(Tensor, self.token_head(fused, self.text.embeddings.word.weight))


def check_masked(
    who: str, ids: Tensor | None, labels: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """What masked language modelling needs, both of the shape of the texts."""
    if ids is None or labels is None:
        raise ValueError(
            f"{who}: mlm_input_ids and mlm_labels must be given unless loss_weights['mlm'] is 0, "
            "got None"
        )
    for name, given in (("mlm_input_ids", ids), ("mlm_labels", labels)):
        if given.shape != like.shape:
            raise ValueError(
                f"{who}: {name} must have shape {tuple(like.shape)}, got {tuple(given.shape)}"
            )
    return ids, labels

"""Models of pairs of a clip and a text, and the losses of retrieval and of pretraining.

Source: ALBEF (NeurIPS 2021) without momentum, as in Singularity (ACL 2023) and SViTT (CVPR 2023).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import svitt_ops as so
from svitt_ops.models.parts.fused_towers import FusedTowers
from svitt_ops.models.parts.layers import in_fp32
from svitt_ops.models.parts.losses import cross_entropy, draw_negatives, labelled, match_pairs
from svitt_ops.models.parts.outputs import PreTrainingOutput, TextOutput, VideoOutput
from svitt_ops.models.parts.text import check_mask
from svitt_ops.models.parts.words import PredictsWords, check_masked


class MatchesPairs(FusedTowers):
    """A learned temperature and the match head: what finds, and ranks what is found."""

    _keys_to_ignore_on_load_unexpected = [r"^token_head\."]  # noqa: RUF012
    output_class: ClassVar[type[PreTrainingOutput]] = PreTrainingOutput
    losses: ClassVar[tuple[str, ...]] = ("vtc", "vtm")
    """The losses that `forward` has, of those that the configuration weighs."""

    def build(self, config: Any) -> None:
        super().build(config)
        self.match_head = nn.Linear(self.pair_width(config), 2)
        # Not a scalar, which `fully_shard` refuses.
        self.temperature = nn.Parameter(torch.tensor([float(config.temperature_init)]))

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            nn.init.constant_(self.temperature, self.config.temperature_init)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        name = f"{prefix}temperature"
        if name in state_dict and state_dict[name].ndim == 0:  # as earlier versions had it
            state_dict[name] = state_dict[name].reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def leaves_parameters_unused(self) -> bool:
        """Whether a loss in training may depend on some parameters only."""
        some = not all(self.config.weights[name] for name in self.losses)
        return some or super().leaves_parameters_unused

    def before_step(self) -> None:
        """Clamp the temperature."""
        self.clamp_temperature()

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Bring the temperature back into its limits; to be called before each step."""
        self.temperature.clamp_(self.config.temperature_min, self.config.temperature_max)

    def match_logits(
        self,
        text_states: Tensor,
        attention_mask: Tensor,
        video_states: Tensor,
        *,
        clips: Tensor | None = None,
    ) -> Tensor:
        """Whether texts and clips match: ``(batch, 2)``, the second is "yes"; see `fuse`."""
        fused = self.fuse(text_states, attention_mask, video_states, clips=clips)
        return in_fp32(self.match_head, fused.states[:, 0])

    def match_scores(
        self, text_states: Tensor, attention_mask: Tensor, video_states: Tensor
    ) -> Tensor:
        """What pairs are ranked by, fp32 ``(batch,)``: the log odds of a match.

        These say how probable it is, also where they are summed; the authors' released code ranks
        by the logit of "yes" alone, as models with their semantics do.
        """
        no, yes = self.match_logits(text_states, attention_mask, video_states).float().unbind(1)
        return yes if self.config.official else yes - no

    def prior_scores(self, similarities: Tensor) -> Tensor:
        """What similarities, of any shape, add to `match_scores` among all candidates, fp32.

        A head that learned against negatives drawn by similarity knows the odds of a match against
        those draws, and by Bayes' rule the odds of a draw belong to it: the contrastive logits, as
        far as no candidate dominates its batch. Against negatives drawn uniformly, and for the
        authors, who rank by the head alone, it is 0.
        """
        if self.config.official or not self.config.hard_negatives:
            return torch.zeros_like(similarities, dtype=torch.float32)
        return similarities.float() / self.temperature.detach().float()

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        pair_ids: Tensor | None = None,
    ) -> PreTrainingOutput:
        """Losses of a batch of pairs; arguments as of `LearnsFromPairs`."""
        video = self.encode_video(pixel_values)
        text = self.encode_text(input_ids, attention_mask)
        return self._weighted(video, text, self._pair_losses(video, text, attention_mask, pair_ids))

    def _pair_losses(
        self, video: VideoOutput, text: TextOutput, attention_mask: Tensor, pair_ids: Tensor | None
    ) -> dict[str, Tensor]:
        """The contrastive and the matching loss, those of weight 0 left out."""
        losses = self._contrast(video, text, pair_ids)
        if self.config.weights["vtm"]:
            pairs = self._draw_pairs(video, text, pair_ids)
            losses["vtm"] = self._match_loss(text.states, attention_mask, video.states, pairs)
        return losses

    def _match_loss(
        self,
        text_states: Tensor,
        attention_mask: Tensor,
        video_states: Tensor,
        pairs: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        """Of pairs that `match_pairs` made."""
        texts, clips, labels = pairs
        states, mask = (x.index_select(0, texts) for x in (text_states, attention_mask))
        return cross_entropy(self.match_logits(states, mask, video_states, clips=clips), labels)

    def _contrast(
        self, video: VideoOutput, text: TextOutput, pair_ids: Tensor | None
    ) -> dict[str, Tensor]:
        """The contrastive loss, unless its weight is 0."""
        if not self.config.weights["vtc"]:
            return {}
        loss = so.info_nce(
            video.embeds, text.embeds, self.temperature, ids=pair_ids, group=self.group()
        )
        return {"vtc": loss}

    def _draw_pairs(
        self, video: VideoOutput, text: TextOutput, pair_ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of the matching loss, as `match_pairs` has them."""
        hard = self.config.hard_negatives
        return match_pairs(
            draw_negatives(video.embeds, text.embeds, self.temperature, pair_ids, hard=hard)
        )

    def _weighted(
        self, video: VideoOutput, text: TextOutput, losses: dict[str, Tensor]
    ) -> PreTrainingOutput:
        weight = self.config.weights
        if not losses:
            raise ValueError(
                f"{type(self).__name__}: loss_weights must be positive for one of "
                f"{', '.join(self.losses)}, got {self.config.loss_weights}"
            )
        return self.output_class(
            loss=sum(weight[name] * loss for name, loss in losses.items()),
            **{f"loss_{name}": loss for name, loss in losses.items()},
            video_embeds=video.embeds,
            text_embeds=text.embeds,
        )


class LearnsFromPairs(MatchesPairs, PredictsWords):
    """A learned temperature and the heads of VTC, VTM and MLM."""

    _keys_to_ignore_on_load_unexpected = []  # noqa: RUF012
    losses = ("vtc", "vtm", "mlm")

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        pair_ids: Tensor | None = None,
        mlm_input_ids: Tensor | None = None,
        mlm_labels: Tensor | None = None,
    ) -> PreTrainingOutput:
        """Losses of a batch of pairs.

        Args:
            pixel_values: ``(batch, frames, 3, image_size, image_size)``.
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``, 0 at padding.
            pair_ids: int64 ``(batch,)``; pairs with equal ids are no negatives of each other.
            mlm_input_ids: ``input_ids`` with masked tokens; needed unless MLM has weight 0.
            mlm_labels: ``(batch, tokens)``, what was masked, -100 elsewhere.
        """
        weight = self.config.weights
        if not weight["mlm"]:
            return super().forward(pixel_values, input_ids, attention_mask, pair_ids)
        masked_ids, labels = check_masked(type(self).__name__, mlm_input_ids, mlm_labels, input_ids)
        check_mask(attention_mask, input_ids)
        # Texts and masked texts pass the layers together: weights are read once, clips once.
        batch, mask = len(input_ids), torch.cat([attention_mask, attention_mask])
        video = self.encode_video(pixel_values)
        both = self.encode_text(torch.cat([input_ids, masked_ids]), mask)
        text = TextOutput(embeds=both.embeds[:batch], states=both.states[:batch])
        losses = self._contrast(video, text, pair_ids)
        clips = torch.arange(batch, device=input_ids.device)
        texts = batch + clips
        if weight["vtm"]:
            *pairs, matching = self._draw_pairs(video, text, pair_ids)
            texts, clips = (torch.cat(x) for x in zip(pairs, (texts, clips), strict=True))
        states, mask = (x.index_select(0, texts) for x in (both.states, mask))
        fused = self.fuse(states, mask, video.states, clips=clips).states
        if weight["vtm"]:
            logits = in_fp32(self.match_head, fused[:-batch, 0])
            losses["vtm"] = cross_entropy(logits, matching)
        masked, labels = labelled(fused[-batch:], labels)
        logits = self.token_head(masked, self.text.embeddings.word.weight)
        losses["mlm"] = cross_entropy(logits, labels)
        return self._weighted(video, text, losses)

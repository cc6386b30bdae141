"""SCL: an image tower over frames, a text tower, two fusion streams, and the models of pairs.

Source: Seeing What You Miss: Vision-Language Pre-training with Semantic Completion Learning
(CVPR 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

import svitt_ops as so
from svitt_ops.models.parts.fused_towers import FusedTowers
from svitt_ops.models.parts.grounding import keep_attention
from svitt_ops.models.parts.layers import embed, in_fp32, renormalized
from svitt_ops.models.parts.losses import cross_entropy
from svitt_ops.models.parts.outputs import (
    PreTrainingOutput,
    TextOutput,
    VideoOutput,
)
from svitt_ops.models.parts.pairs import MatchesPairs
from svitt_ops.models.parts.words import check_masked
from svitt_ops.models.scl.configuration import SCLConfig
from svitt_ops.models.scl.fusion import DualStreamFusion, DualStreamOutput, TwoLayerHead, WordHead
from svitt_ops.models.scl.losses import (
    completion_loss,
    draw_pairs,
    rank_loss,
    text_contrast,
)
from svitt_ops.models.scl.vision import FrameTower


def without(*heads: str) -> list[str]:
    """Names of other models' heads that these leave without a word, as `transformers` wants."""
    return [rf"^({'|'.join(heads)})\.", r"^(temperature|second_type)$"]


class SCLModel(FusedTowers):
    """The towers and the fusion streams of SCL."""

    norms_pooled = False
    video_class = FrameTower
    fusion_class = DualStreamFusion
    config_class = SCLConfig
    config: SCLConfig
    video: FrameTower
    _no_split_modules = ["FrameLayer", "TextLayer"]  # noqa: RUF012 (as the base's)
    _keys_to_ignore_on_load_unexpected = without(
        *("match_head", "rank_head", "token_head", "class_head"),
        *("video_projection", "text_projection"),
    )

    def build(self, config: Any) -> None:
        super().build(config)
        self.types = nn.Embedding(2, config.text_hidden_size)  # of texts, of clips

    def build_projection(self, config: Any, dim: int) -> nn.Module:
        """From a [CLS] after its stream's projection to embeddings."""
        width = config.text_hidden_size
        return TwoLayerHead(width, width, config.projection_dim)

    def pair_width(self, config: Any) -> int:
        """Width of the vector that says what a text and a clip are together."""
        return 2 * super().pair_width(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FrameTower) and module.frame_positions is not None:
            nn.init.zeros_(module.frame_positions)

    @property
    def frame_size(self) -> int:
        """Tokens of a frame: its [CLS] and its patches."""
        return 1 + self.config.grid_size**2

    def fit_frames(self, num_frames: int) -> None:
        """Have positions of frames, or none for images."""
        self.video.fit_frames(num_frames)

    def pool(self, tokens: Tensor) -> Tensor:
        """The vector of each clip: the mean of its frames' [CLS]."""
        return tokens[:, :: self.frame_size].mean(1)

    def encode_video(self, pixel_values: Tensor, kept: Tensor | None = None) -> VideoOutput:
        """Encode clips.

        Args:
            pixel_values: ``(batch, frames, 3, image_size, image_size)``, or of images
                ``(batch, 3, image_size, image_size)``; normalised to mean 0.5 and deviation 0.5,
                from which they come to the mean and deviation of the configuration. At most
                ``config.num_frames`` frames.
            kept: int64 ``(batch, k)``, numbers of the patches of a frame that are read; by default
                all are.

        Returns:
            The states that fusion takes, ``(batch, frames (1 + k), text_hidden_size)``, each
            frame's [CLS] before its patches; without ``kept`` also the embeddings.
        """
        config = self.config
        frames = pixel_values[:, None] if pixel_values.dim() == 4 else pixel_values
        frames = renormalized(frames, config.image_mean, config.image_std)
        found = self.video(frames, kept)
        states = self.fusion.video_transform(self.video_norm(found.tokens))
        embeds = None
        if self.projects and kept is None:
            embeds = embed(self.video_projection, self.pool(states))
        return VideoOutput(embeds=embeds, states=states, indices=found.indices)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> TextOutput:
        """Encode texts; both arguments ``(batch, tokens)``, the mask 0 at padding."""
        states = self.fusion.text_transform(self.text(input_ids, attention_mask))
        embeds = embed(self.text_projection, states[:, 0]) if self.projects else None
        return TextOutput(embeds=embeds, states=states)

    def fuse(
        self,
        text_states: Tensor,
        attention_mask: Tensor,
        video_states: Tensor,
        video_indices: Tensor | None = None,
        *,
        clips: Tensor | None = None,
        frame_size: int | None = None,
        video_type: Tensor | None = None,
    ) -> DualStreamOutput:
        """Let texts and their clips attend over each other, row by row.

        Args:
            text_states: ``(batch, tokens, text_hidden_size)`` of `encode_text`.
            attention_mask: ``(batch, tokens)``, 0 at padding.
            video_states: ``(batch, frames (1 + n), text_hidden_size)`` of `encode_video`.
            video_indices: ``(batch, n)``, numbers of the patches, carried along.
            clips: int64 ``(batch,)``, the row of the video's arguments of each text, where texts
                share clips; by default its own.
            frame_size: tokens of a frame in ``video_states``; by default [CLS] and all patches.
            video_type: what says that tokens are a clip's, ``(1, text_hidden_size)``.
        """
        of_text, of_video = self.types.weight.split(1)
        video_type = of_video if video_type is None else video_type
        size = self.frame_size if frame_size is None else frame_size
        video = video_states + video_type
        if clips is not None:
            video = video.index_select(0, clips)
            video_indices = None if video_indices is None else video_indices[clips]
        found: DualStreamOutput = self.fusion(text_states + of_text, attention_mask, video, size)
        found.video_indices = video_indices
        return found


class SCLPairs(SCLModel, MatchesPairs):
    """What models of pairs share: a learned temperature, and the head that judges pairs."""

    _keys_to_ignore_on_load_unexpected = without("rank_head", "token_head", "class_head")

    def clamp_temperature(self) -> None:
        """Bring the temperature back into its limits; the released code has none."""
        if not self.config.official:
            super().clamp_temperature()

    def match_logits(
        self,
        text_states: Tensor,
        attention_mask: Tensor,
        video_states: Tensor,
        *,
        clips: Tensor | None = None,
    ) -> Tensor:
        """Whether texts and clips match: ``(batch, 2)``, the second is "yes"; see `fuse`."""
        pooled = self.fuse(text_states, attention_mask, video_states, clips=clips).pooled
        return in_fp32(self.match_head, pooled)

    @torch.no_grad()
    def class_attention(
        self, text_states: Tensor, attention_mask: Tensor, video_states: Tensor
    ) -> Tensor:
        """How the texts' [CLS] attends over the clips' tokens in every fusion layer.

        Returns:
            ``(batch, layers, frames (1 + n))``, mean over the heads; arguments as of `fuse`.
        """
        with ExitStack() as kept:
            maps = [
                kept.enter_context(keep_attention(layer.cross_attention))
                for layer in self.fusion.layers
            ]
            self.fuse(text_states, attention_mask, video_states)
        return torch.stack([found[:, :, 0].mean(1) for (found,) in maps], 1)


@dataclass
class SCLPreTrainingOutput(PreTrainingOutput):
    """Losses of a batch, and the embeddings they come from; a loss of weight 0 is None.

    Attributes:
        loss_scl: loss of semantic completion, of clips and of texts.
    """

    loss_scl: Tensor | None = None


class SCLForPreTraining(SCLPairs):
    """SCL with a learned temperature and the heads of its four losses."""

    losses = ("vtc", "vtm", "mlm", "scl")
    output_class = SCLPreTrainingOutput
    _keys_to_ignore_on_load_unexpected = without("rank_head", "class_head")

    def build(self, config: Any) -> None:
        super().build(config)
        self.token_head = WordHead(config)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        pair_ids: Tensor | None = None,
        mlm_input_ids: Tensor | None = None,
        mlm_labels: Tensor | None = None,
        masked_input_ids: Tensor | None = None,
        patch_noise: Tensor | None = None,
    ) -> PreTrainingOutput:
        """Losses of a batch of pairs.

        Args:
            pixel_values: as `encode_video` takes them.
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``, 0 at padding.
            pair_ids: int64 ``(batch,)``; pairs with equal ids are no negatives of each other where
                they are contrasted and matched; completion tells all pairs apart.
            mlm_input_ids: ``input_ids`` with masked tokens; needed unless MLM has weight 0.
            mlm_labels: ``(batch, tokens)``, what was masked, -100 elsewhere.
            masked_input_ids: ``input_ids`` with more masked tokens, from which the clip is to
                complete the text; needed unless SCL has weight 0.
            patch_noise: ``(batch, patches of a frame)``, of which the patches with the least are
                kept; needed unless SCL has weight 0.
        """
        weight, losses = self.config.weights, {}
        video = self.encode_video(pixel_values)
        text = self.encode_text(input_ids, attention_mask)
        if weight["vtc"]:
            losses["vtc"] = so.info_nce(
                video.embeds, text.embeds, self.temperature, ids=pair_ids, group=self.sharing()
            )
        if weight["vtm"]:
            rows, labels = draw_pairs(len(input_ids), pair_ids, input_ids.device)
            logits = self.match_logits(text.states, attention_mask, video.states, clips=rows)
            losses["vtm"] = cross_entropy(logits, labels)
        if weight["mlm"]:
            ids, labels = check_masked(type(self).__name__, mlm_input_ids, mlm_labels, input_ids)
            logits = self.word_logits(ids, attention_mask, video.states)
            losses["mlm"] = cross_entropy(logits.flatten(0, 1), labels.flatten())
        if weight["scl"]:
            if masked_input_ids is None or patch_noise is None:
                raise ValueError(
                    f"{type(self).__name__}: masked_input_ids and patch_noise must be given unless "
                    "loss_weights['scl'] is 0, got None"
                )
            masked_video = self.encode_video(pixel_values, self.kept_patches(patch_noise))
            masked_text = self.encode_text(masked_input_ids, attention_mask)
            losses["scl"] = self.completion(
                (video.states, text.states),
                (masked_video.states, masked_text.states),
                attention_mask,
            )
        return self._weighted(video, text, losses)

    def word_logits(
        self, input_ids: Tensor, attention_mask: Tensor, video_states: Tensor
    ) -> Tensor:
        """Logits of the pieces at every place of texts, ``(batch, tokens, vocab_size)``.

        Args:
            input_ids: ``(batch, tokens)``, some of them masked.
            attention_mask: ``(batch, tokens)``, 0 at padding.
            video_states: of `encode_video`.
        """
        masked = self.fusion.text_transform(self.text(input_ids, attention_mask))
        return cast(Tensor, self.token_head(self.fuse(masked, attention_mask, video_states).states))

    def kept_patches(self, noise: Tensor) -> Tensor:
        """Which patches masked clips keep, int64 ``(batch, k)``: those with the least noise."""
        patches, share = self.config.grid_size**2, 1 - self.config.patch_mask_share
        if noise.dim() != 2 or noise.shape[1] != patches:
            raise ValueError(
                f"{type(self).__name__}: patch_noise must have shape (batch, {patches}), "
                f"got {tuple(noise.shape)}"
            )
        # Theirs cuts what rounding leaves a little too small, such as 25 (1 - 0.8).
        count = int(patches * share) if self.config.official else int(patches * share + 1e-6)
        return noise.argsort(1)[:, : max(1, count)]

    def completion(
        self, whole: tuple[Tensor, Tensor], masked: tuple[Tensor, Tensor], attention_mask: Tensor
    ) -> Tensor:
        """The loss of semantic completion, both ways.

        Args:
            whole: states of clips and of texts.
            masked: of the masked ones; clips have fewer patches.
            attention_mask: ``(batch, tokens)``, 0 at padding.
        """
        (video, text), (masked_video, masked_text) = whole, masked
        size = masked_video.shape[1] * self.frame_size // video.shape[1]
        of_video = self.fuse(text, attention_mask, masked_video, frame_size=size)
        of_text = self.fuse(masked_text, attention_mask, video)
        official, symmetric = self.config.official, self.config.completion_symmetric
        temperature = self.config.completion_temperature
        video_loss = completion_loss(
            of_video.video_states[:, ::size],
            of_text.video_states[:, :: self.frame_size],
            temperature,
            group=self.sharing(),
            symmetric=symmetric,
            over_frames=official and self.config.num_frames > 1,
        )
        own_texts = official and self.config.num_frames == 1
        text_loss = completion_loss(
            of_text.states[:, 0],
            of_video.states[:, 0],
            temperature,
            group=None if own_texts else self.sharing(),
            symmetric=symmetric,
        )
        return video_loss + text_loss


class SCLForRetrieval(SCLPairs):
    """SCL with a learned temperature and the head that ranks a clip's text among false ones."""

    losses = ("vtc", "vtm")
    derived = ("rank_head.",)
    frozen = ("match_head.",)  # what the rank head started from
    _keys_to_ignore_on_load_unexpected = without("token_head", "class_head")

    def build(self, config: Any) -> None:
        super().build(config)
        self.rank_head = nn.Linear(self.pair_width(config), 1)

    @torch.no_grad()
    def start_missing(self, missing: Sequence[str]) -> list[str]:
        """Start the rank head as the match head's row of "yes", if that has weights."""
        left = set(missing)
        for part in ("weight", "bias"):
            own, source = f"rank_head.{part}", f"match_head.{part}"
            if own in left and source not in left:
                self.get_parameter(own).copy_(self.get_parameter(source)[1:])
                left.remove(own)
        return super().start_missing([name for name in missing if name in left])

    def match_scores(
        self, text_states: Tensor, attention_mask: Tensor, video_states: Tensor
    ) -> Tensor:
        """What pairs are ranked by, fp32 ``(batch,)``."""
        pooled = self.fuse(text_states, attention_mask, video_states).pooled
        return in_fp32(self.rank_head, pooled).float().squeeze(1)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        pair_ids: Tensor | None = None,
        false_input_ids: Tensor | None = None,
        false_attention_mask: Tensor | None = None,
    ) -> PreTrainingOutput:
        """Losses of a batch of clips, their texts, and false ones.

        Args:
            pixel_values: as `encode_video` takes them.
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``, 0 at padding.
            pair_ids: int64 ``(batch,)``; pairs with equal ids are no negatives of each other.
            false_input_ids: ``(batch, texts, tokens)``, of other clips.
            false_attention_mask: like ``false_input_ids``.
        """
        if false_input_ids is None or false_attention_mask is None:
            raise ValueError(
                f"{type(self).__name__}: false_input_ids and false_attention_mask must be given, "
                "got None"
            )
        batch, tokens = input_ids.shape
        for false in (false_input_ids, false_attention_mask):
            if false.dim() != 3 or (false.shape[0], false.shape[2]) != (batch, tokens):
                raise ValueError(
                    f"{type(self).__name__}: false_input_ids and false_attention_mask must have "
                    f"shape ({batch}, texts, {tokens}), got {tuple(false.shape)}"
                )
        ids, mask = (
            torch.cat([own[:, None], other], 1)
            for own, other in ((input_ids, false_input_ids), (attention_mask, false_attention_mask))
        )
        texts = ids.shape[1]
        video = self.encode_video(pixel_values)
        text = self.encode_text(ids.flatten(0, 1), mask.flatten(0, 1))
        weight, losses = self.config.weights, {}
        if weight["vtc"]:
            embeds = text.embeds.unflatten(0, (batch, texts))
            compared, told = video.embeds, pair_ids
            if self.config.official:
                compared, told = compared[:1], None
            losses["vtc"] = text_contrast(compared, embeds, self.temperature, told)
        if weight["vtm"]:
            clips = video.states.repeat_interleave(texts, 0)
            scores = self.match_scores(text.states, mask.flatten(0, 1), clips)
            losses["vtm"] = rank_loss(scores.unflatten(0, (batch, texts)))
        return self._weighted(video, TextOutput(embeds=text.embeds[::texts]), losses)

"""SViTT: video tower, text tower, fusion, and the three losses of pretraining.

Source: SViTT (CVPR 2023); the losses are ALBEF's (NeurIPS 2021) without momentum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

import svitt_ops as so
from svitt_ops.models.parts.configuration import OFFICIAL, SViTTConfig
from svitt_ops.models.parts.layers import Residual, in_fp32
from svitt_ops.models.parts.loading import load_folder
from svitt_ops.models.parts.outputs import (
    FusionOutput,
    SViTTPreTrainingOutput,
    TextOutput,
    VideoOutput,
)
from svitt_ops.models.parts.text import FusionEncoder, TextTower
from svitt_ops.models.parts.video import VideoTower
from svitt_ops.nn import RelativePositionBias3D

IGNORED = -100
"""Label of what adds nothing to a loss."""


class TwoTowers(PreTrainedModel):
    """What every model here has: a video tower, a text tower, and projections into one space."""

    config_class = SViTTConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["VideoLayer", "TextLayer"]  # noqa: RUF012 (the base class has it so)
    config: SViTTConfig

    def __init__(self, config: SViTTConfig) -> None:
        config.check()
        super().__init__(config)
        self.video = VideoTower(config)
        self.text = TextTower(config)
        self.video_projection = nn.Linear(config.hidden_size, config.projection_dim)
        self.text_projection = nn.Linear(config.text_hidden_size, config.projection_dim)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """As transformers', where weights of another resolution or of other frames are resized.

        So ``from_pretrained(folder, image_size=384, num_frames=8)`` works from any of them; see
        `change_image_size` and `expand_frames`.

        Raises:
            ValueError: another field of the configuration is not that of the weights, or the
                weights are damaged, not finite, or of another model.
        """
        load = super().from_pretrained
        if pretrained_model_name_or_path is None or args:
            return load(pretrained_model_name_or_path, *args, config=config, **kwargs)
        return load_folder(load, cls, pretrained_model_name_or_path, config, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of the text's tokens."""
        return self.text.embeddings.word

    def before_step(self) -> None:
        self.clamp_temperature()

    @property
    def leaves_parameters_unused(self) -> bool:
        return not all(self.config.loss_weights.values())

    def group(self) -> dist.ProcessGroup | None:
        """The processes that share a batch while training: negatives come from all of them."""
        shared = dist.is_available() and dist.is_initialized() and self.training
        return dist.group.WORLD if shared and self.config.compat != OFFICIAL else None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Guarded by transformers: what was loaded from a checkpoint stays.
        if isinstance(module, RelativePositionBias3D):
            module.reset_parameters()
            module.codes = so.position_codes(module.grid, device=module.codes.device)
        elif isinstance(module, Residual) and module.scale is not None:
            nn.init.constant_(module.scale, module.initial_scale)
        elif isinstance(module, VideoTower):
            module.reset_positions(module.cls_token.device)
            nn.init.zeros_(module.cls_token)
            std = self.config.initializer_range
            for positions in (module.cls_position, module.patch_positions):
                if positions is not None:
                    nn.init.normal_(positions, std=std)


class SViTTModel(TwoTowers):
    """The towers and the fusion layers of SViTT."""

    def __init__(self, config: SViTTConfig) -> None:
        super().__init__(config)
        self.video_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.pooler_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.fusion = FusionEncoder(config)
        if type(self) is SViTTModel:
            self.post_init()

    def encode_video(self, pixel_values: Tensor) -> VideoOutput:
        """Encode clips.

        Args:
            pixel_values: ``(batch, frames, 3, image_size, image_size)``, normalised to mean 0.5 and
                deviation 0.5 as BEiT's; at most ``config.num_frames`` frames.
        """
        found = self.video(pixel_values)
        tokens = found.tokens
        pooled = tokens[:, 0] if self.config.video_pooling == "cls" else tokens[:, 1:].mean(1)
        embeds = in_fp32(self.video_projection, self.pooler_norm(pooled))
        return VideoOutput(
            embeds=F.normalize(embeds.float(), dim=-1),
            states=self.video_norm(tokens),
            indices=found.indices,
            indices_per_stage=found.indices_per_stage,
        )

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> TextOutput:
        """Encode texts; both arguments ``(batch, tokens)``, the mask 0 at padding."""
        states = self.text(input_ids, attention_mask)
        embeds = in_fp32(self.text_projection, states[:, 0])
        return TextOutput(embeds=F.normalize(embeds.float(), dim=-1), states=states)

    def fuse(
        self,
        text_states: Tensor,
        attention_mask: Tensor,
        video_states: Tensor,
        video_indices: Tensor | None = None,
    ) -> FusionOutput:
        """Let texts attend over their clips, row by row.

        Args:
            text_states: ``(batch, tokens, text_hidden_size)`` of `encode_text`.
            attention_mask: ``(batch, tokens)``, 0 at padding.
            video_states: ``(batch, 1 + n, hidden_size)`` of `encode_video`.
            video_indices: ``(batch, n)``, numbers of the patches, carried along.
        """
        found = self.fusion(text_states, attention_mask, video_states, video_indices)
        return FusionOutput(states=found[0], video_indices=found[1])

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[VideoOutput, TextOutput, FusionOutput]:
        """Encode pairs and fuse them."""
        video = self.encode_video(pixel_values)
        text = self.encode_text(input_ids, attention_mask)
        return video, text, self.fuse(text.states, attention_mask, video.states, video.indices)


class MaskedTokenHead(nn.Module):
    """Logits of the pieces; the decoder is the table of word embeddings itself, so tied."""

    def __init__(self, config: SViTTConfig) -> None:
        super().__init__()
        dim = config.text_hidden_size
        self.dense = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, config.text_layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, states: Tensor, words: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(states))), words, self.bias)


class SViTTForPreTraining(SViTTModel):
    """SViTT with a learned temperature and the heads of VTC, VTM and MLM."""

    def __init__(self, config: SViTTConfig) -> None:
        super().__init__(config)
        self.match_head = nn.Linear(config.text_hidden_size, 2)
        self.token_head = MaskedTokenHead(config)
        # Not a scalar, which `fully_shard` refuses.
        self.temperature = nn.Parameter(torch.tensor([float(config.temperature_init)]))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            nn.init.constant_(self.temperature, self.config.temperature_init)
        elif isinstance(module, MaskedTokenHead):
            nn.init.zeros_(module.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        name = f"{prefix}temperature"
        if name in state_dict and state_dict[name].ndim == 0:  # as earlier versions had it
            state_dict[name] = state_dict[name].reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Bring the temperature back into its limits; to be called before each step."""
        self.temperature.clamp_(self.config.temperature_min, self.config.temperature_max)

    def match_logits(
        self, text_states: Tensor, attention_mask: Tensor, video_states: Tensor
    ) -> Tensor:
        """Whether texts and clips match, row by row: ``(batch, 2)``, the second is "yes"."""
        fused = self.fuse(text_states, attention_mask, video_states)
        return in_fp32(self.match_head, fused.states[:, 0])

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        pair_ids: Tensor | None = None,
        mlm_input_ids: Tensor | None = None,
        mlm_labels: Tensor | None = None,
    ) -> SViTTPreTrainingOutput:
        """Losses of a batch of pairs.

        Args:
            pixel_values: ``(batch, frames, 3, image_size, image_size)``.
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``, 0 at padding.
            pair_ids: int64 ``(batch,)``; pairs with equal ids are no negatives of each other.
            mlm_input_ids: ``input_ids`` with masked tokens; needed unless MLM has weight 0.
            mlm_labels: ``(batch, tokens)``, what was masked, -100 elsewhere.
        """
        video = self.encode_video(pixel_values)
        text = self.encode_text(input_ids, attention_mask)
        weight = {name: self.config.loss_weights.get(name, 1) for name in ("vtc", "vtm", "mlm")}
        losses: dict[str, Tensor] = {}
        if weight["vtc"]:
            losses["vtc"] = so.info_nce(
                video.embeds, text.embeds, self.temperature, ids=pair_ids, group=self.group()
            )
        if weight["vtm"]:
            losses["vtm"] = self._match_loss(video, text, attention_mask, pair_ids)
        if weight["mlm"]:
            if mlm_input_ids is None or mlm_labels is None:
                raise ValueError(
                    "SViTTForPreTraining: mlm_input_ids and mlm_labels must be given unless "
                    "loss_weights['mlm'] is 0, got None"
                )
            masked = self.text(mlm_input_ids, attention_mask)
            fused = self.fuse(masked, attention_mask, video.states)
            logits = self.token_head(fused.states, self.text.embeddings.word.weight)
            losses["mlm"] = _cross_entropy(logits.flatten(0, 1), mlm_labels.flatten())
        return SViTTPreTrainingOutput(
            loss=sum(weight[name] * loss for name, loss in losses.items()),
            **{f"loss_{name}": loss for name, loss in losses.items()},
            video_embeds=video.embeds,
            text_embeds=text.embeds,
        )

    def _match_loss(
        self, video: VideoOutput, text: TextOutput, attention_mask: Tensor, ids: Tensor | None
    ) -> Tensor:
        """Loss of 3 B pairs: those that match, and one wrong clip and one wrong text for each.

        A row of the batch without a negative (all others have its id) is left out: its pair is
        made with row 0 to keep the shapes, and its label is ignored.
        """
        queries = [text.embeds.detach(), video.embeds.detach()]
        if not self.config.hard_negatives:
            queries = [torch.zeros_like(x) for x in queries]  # all keys are equally likely
        temperature = self.temperature.detach()
        clip = so.sample_hard_negatives(queries[0], video.embeds, temperature, ids=ids)
        other = so.sample_hard_negatives(queries[1], text.embeds, temperature, ids=ids)
        clip_row, other_row = clip.clamp(min=0), other.clamp(min=0)
        logits = self.match_logits(
            torch.cat([text.states, text.states, text.states[other_row]]),
            torch.cat([attention_mask, attention_mask, attention_mask[other_row]]),
            torch.cat([video.states, video.states[clip_row], video.states]),
        )
        found = torch.cat([clip, other])
        labels = torch.cat([torch.ones_like(clip), torch.where(found < 0, IGNORED, 0)])
        return _cross_entropy(logits, labels)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels that count; 0, not NaN, where none does."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)

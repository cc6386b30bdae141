"""Where in an image the words of a text are found: Grad-CAM of a fusion layer's cross-attention.

Source: ALBEF (NeurIPS 2021), section 6; Grad-CAM (ICCV 2017).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from svitt_ops.models.parts.pairs import MatchesPairs
from svitt_ops.nn import BlockSparseSelfAttention, CrossAttention, merge_heads, split_heads


@dataclass(frozen=True, kw_only=True)
class WordMaps:
    """Grad-CAM of words on the patches of their images.

    Attributes:
        attention: ``(batch, heads, tokens, n)``, the layer's over the patches, 0 at padding.
        gradient: like ``attention``, of the match logit, where it is positive, else 0.
        logits: match logits ``(batch, 2)``.
    """

    attention: Tensor
    gradient: Tensor
    logits: Tensor

    @property
    def words(self) -> Tensor:
        """Of every token, ``(batch, tokens, n)``: mean over the heads."""
        return (self.attention * self.gradient).mean(1)

    @property
    def texts(self) -> Tensor:
        """Of every text, ``(batch, n)``: mean over its padded length, as the authors have it."""
        return self.words.mean(1)


@contextmanager
def keep_attention(module: CrossAttention | BlockSparseSelfAttention) -> Iterator[list[Tensor]]:
    """Compute one module's attention step by step; its maps are what the list comes to hold.

    Args:
        module: a `CrossAttention` or a dense `BlockSparseSelfAttention`. All others stay with their
            fused kernels, which form no map.

    Yields:
        A list that gets ``(batch, heads, queries, keys)`` of every call, a leaf of the graph if
        gradients are recorded.
    """
    maps: list[Tensor] = []

    def attend(tokens: Tensor, context: object = None, **options: object) -> Tensor:
        source, rows = tokens, options.get("context_rows")
        if isinstance(context, Tensor):
            source = context[rows] if isinstance(rows, Tensor) else context
        query, key, value = (
            split_heads(project(x), module.num_heads)
            for project, x in (
                (module.query, tokens), (module.key, source), (module.value, source)
            )
        )  # fmt: skip
        logits = (query.float() @ key.float().mT) * query.shape[-1] ** -0.5
        ignored = options.get("key_padding_mask")
        if isinstance(ignored, Tensor):
            logits = logits.masked_fill(ignored[:, None, None], -torch.inf)
        attention = logits.softmax(-1)
        if torch.is_grad_enabled():
            attention = attention.detach().requires_grad_()
        maps.append(attention)
        found: Tensor = module.out(merge_heads(attention.to(value.dtype) @ value))
        return found

    module.__dict__["forward"] = attend
    try:
        yield maps
    finally:
        del module.__dict__["forward"]


class GroundsWords(MatchesPairs):
    """A model of pairs that shows where it finds the words of a text."""

    def grounding_layer(self, layer: int | None = None) -> int:
        """The fusion layer that maps are made of, counted from 0 at the first text layer.

        By default it is the one at two thirds of all, as the authors have it (8 of 12), if it fuses
        and is not the last, in which words have no gradient.

        Raises:
            ValueError: ``layer`` is no fusion layer.
        """
        first, last = self.config.fusion_layer, self.config.text_num_hidden_layers - 1
        layer = max(first, min(2 * (last + 1) // 3, last - 1)) if layer is None else layer
        if not first <= layer <= last:
            raise ValueError(
                f"{type(self).__name__}: layer must be a fusion layer, {first} to {last}, "
                f"got {layer}"
            )
        return layer

    def word_maps(
        self,
        text_states: Tensor,
        attention_mask: Tensor,
        video_states: Tensor,
        *,
        layer: int | None = None,
    ) -> WordMaps:
        """Grad-CAM of the match logit on the words' attention in one fusion layer.

        Args:
            text_states: ``(batch, tokens, text_hidden_size)`` of `encode_text`.
            attention_mask: ``(batch, tokens)``, 0 at padding.
            video_states: ``(batch, 1 + n, hidden_size)`` of `encode_video`.
            layer: as of `grounding_layer`. In the last one the logit depends on [CLS] alone, so the
                maps of all other words are zero.

        Raises:
            ValueError: ``layer`` is no fusion layer.
        """
        place = self.grounding_layer(layer) - self.config.fusion_layer
        attention = self.fusion.layers[place].cross_attention
        with torch.enable_grad(), keep_attention(attention) as maps:
            inputs = (text_states.detach(), attention_mask, video_states.detach())
            logits = self.match_logits(*inputs)
            (kept,) = maps
            (gradient,) = torch.autograd.grad(logits[:, 1].sum(), kept)
        real = (attention_mask != 0)[:, None, :, None]
        attended, gradient = (x[..., 1:] * real for x in (kept.detach(), gradient.clamp(min=0)))
        return WordMaps(attention=attended, gradient=gradient, logits=logits.detach())

    def ground(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        layer: int | None = None,
    ) -> Tensor:
        """Where images have what texts mean, ``(batch, grid_size, grid_size)``: `WordMaps.texts`.

        Args:
            pixel_values: as `encode_video` takes them.
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``, 0 at padding.
            layer: as of `word_maps`.
        """
        with torch.no_grad():
            video = self.encode_video(pixel_values).states
            text = self.encode_text(input_ids, attention_mask).states
        maps = self.word_maps(text, attention_mask, video, layer=layer).texts
        return maps.unflatten(1, (-1, self.config.grid_size))


def class_maps(
    model: MatchesPairs, pixel_values: Tensor, text_embeds: Tensor, *, layer: int
) -> Tensor:
    """Grad-CAM of images and texts' similarity on [CLS]'s attention in one layer of the tower.

    Args:
        model: a dense one.
        pixel_values: as its `encode_video` takes them.
        text_embeds: ``(batch, projection_dim)`` of `encode_text`.
        layer: of the image tower, from 0.

    Returns:
        ``(batch, n)``, over the patches: mean over the heads of attention times its gradient, where
        that is positive.

    Raises:
        ValueError: the model is sparse, or has no such layer.
    """
    config = model.config
    if config.edge_sparsity or config.keep_rate < 1:
        raise ValueError("class_maps: model must be dense, got a sparse one")
    if not 0 <= layer < config.num_hidden_layers:
        raise ValueError(
            f"class_maps: layer must be 0 to {config.num_hidden_layers - 1}, got {layer}"
        )
    attention = model.video.layers[layer].attention
    with torch.enable_grad(), keep_attention(attention) as maps:
        embeds = model.encode_video(pixel_values).embeds
        score = (embeds * text_embeds.detach() / model.temperature.detach()).sum()
        (kept,) = maps
        (gradient,) = torch.autograd.grad(score, kept)
    found = kept.detach() * gradient.clamp(min=0)
    return found[:, :, 0, 1:].mean(1)

"""COOKIE: images and texts encoded apart, by layers whose weights they share.

Source: COOKIE: Contrastive cross-modal knowledge sharing pre-training (ICCV 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import ModelOutput

import svitt_ops as so
from svitt_ops.models.cookie.configuration import COOKIEConfig
from svitt_ops.models.cookie.convolution import ConvolutionalTower
from svitt_ops.models.cookie.hashing import (
    HashLayer,
    centre_loss,
    hash_centres,
    hash_targets,
    pairwise_loss,
    quantisation_loss,
)
from svitt_ops.models.cookie.layers import SharedLayers, VisionTower
from svitt_ops.models.cookie.losses import triplet_loss
from svitt_ops.models.cookie.pooling import GeneralizedPooling, MeanPooling, leave_out
from svitt_ops.models.parts.distortion import distort
from svitt_ops.models.parts.layers import in_fp32
from svitt_ops.models.parts.outputs import TextOutput, VideoOutput
from svitt_ops.models.parts.text import TextTower
from svitt_ops.models.parts.two_towers import TwoTowers

RANDOM_CENTRE_SEED = 1


@dataclass
class COOKIEOutput(ModelOutput):
    """Losses of a batch of pairs, and the embeddings they come from; a loss of weight 0 is None.

    Attributes:
        loss: weighted sum of the others.
        loss_ccl: contrastive loss of images and texts, the sum of both directions.
        loss_vcl: contrastive loss of two views of the images.
        loss_tcl: contrastive loss of two views of the texts.
        loss_match: of retrieval: a triplet loss, or the contrastive one.
        video_embeds: ``(batch, hidden_size)``, of what was contrasted.
        text_embeds: ``(batch, hidden_size)``.
    """

    loss: Tensor | None = None
    loss_ccl: Tensor | None = None
    loss_vcl: Tensor | None = None
    loss_tcl: Tensor | None = None
    loss_match: Tensor | None = None
    video_embeds: Tensor | None = None
    text_embeds: Tensor | None = None


@dataclass
class HashingOutput(ModelOutput):
    """Losses of a batch of images with classes; one of weight 0 is None.

    Attributes:
        loss: weighted sum of the others.
        loss_centre: cross-entropy with the codes of the images' classes.
        loss_pairwise: of the similarity of the batch's halves.
        loss_quantisation: distance from codes of 1 and -1.
        codes: ``(batch, hash_bits)`` in (-1, 1).
    """

    loss: Tensor | None = None
    loss_centre: Tensor | None = None
    loss_pairwise: Tensor | None = None
    loss_quantisation: Tensor | None = None
    codes: Tensor | None = None


class COOKIEModel(TwoTowers):
    """The two streams: an embedding for each image, and for each text."""

    projects = False
    config_class = COOKIEConfig
    config: COOKIEConfig
    _keys_to_ignore_on_load_unexpected = [r"^hash_layer\.", r"^(random_)?centres?$"]  # noqa: RUF012

    def build(self, config: Any) -> None:
        width = config.hidden_size
        self.video = VisionTower(config)
        self.text = TextTower(config)
        self.text_projection = nn.Linear(config.text_hidden_size, width)
        self.video_type = nn.Parameter(torch.zeros(width))
        self.text_type = nn.Parameter(torch.zeros(width))
        self.shared = SharedLayers(config)
        self.text_shared = SharedLayers(config) if config.weight_sharing == "unshared" else None
        self.video_pool, self.text_pool = (
            GeneralizedPooling(config.gpo_size) if config.pooling == "gpo" else MeanPooling()
            for _ in range(2)
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, VisionTower):
            nn.init.normal_(module.patch_positions, std=std)
        elif isinstance(module, nn.GRU):
            module.reset_parameters()
        elif module is self:
            for kind in (self.video_type, self.text_type):
                nn.init.normal_(kind, std=std)

    def encode_video(self, pixel_values: Tensor) -> VideoOutput:
        """Encode images, or the given features of videos.

        Args:
            pixel_values: ``(batch, 3, image_size, image_size)``, or with one frame,
                ``(batch, 1, 3, image_size, image_size)``; normalised to mean 0.5 and deviation 0.5,
                from which they come to the mean and deviation of the configuration. With a
                ``feature_size``, ``(batch, frames, feature_size)``.

        Returns:
            Embeddings ``(batch, hidden_size)``, and the states ``(batch, n, hidden_size)`` that
            they are pooled from, of the features row by row.
        """
        states = self.shared(self.video(pixel_values) + self.video_type)
        pooled, lengths = states, None
        if self.training and self.config.feature_drop > 0:
            pooled, lengths = leave_out(states, self.config.feature_drop)
        return VideoOutput(embeds=_normalised(self.video_pool(pooled, lengths)), states=states)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> TextOutput:
        """Encode texts; both arguments ``(batch, tokens)``, the mask 0 at padding, which follows.

        Returns:
            Embeddings ``(batch, hidden_size)``, and the states ``(batch, tokens, hidden_size)``
            that they are pooled from.
        """
        words = self.text_projection(self.text(input_ids, attention_mask)) + self.text_type
        layers = self.shared if self.text_shared is None else self.text_shared
        states = layers(words, attention_mask == 0)
        pooled = self.text_pool(states, (attention_mask != 0).sum(1))
        return TextOutput(embeds=_normalised(pooled), states=states)

    def group(self) -> dist.ProcessGroup | None:
        """The processes that share a batch while training."""
        return None if self.config.contrast_scope == "local" else super().group()

    @torch.no_grad()
    def salience(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """How similar the states behind the shared layers are to what is pooled from them.

        Returns:
            Cosines of the features with the image's embedding ``(batch, n)``, of the words with the
            text's ``(batch, tokens)``, and of the features with the words ``(batch, tokens, n)``.
        """
        video = self.encode_video(pixel_values)
        text = self.encode_text(input_ids, attention_mask)
        regions, words = _normalised(video.states), _normalised(text.states)
        own = [
            (x @ found.embeds[..., None])[..., 0] for x, found in ((regions, video), (words, text))
        ]
        return own[0], own[1], words @ regions.mT

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[VideoOutput, TextOutput]:
        """Encode pairs."""
        return self.encode_video(pixel_values), self.encode_text(input_ids, attention_mask)


class COOKIEForRetrieval(COOKIEModel):
    """COOKIE tuned to find images by text and texts by image, or videos by their features."""

    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        pair_ids: Tensor | None = None,
    ) -> COOKIEOutput:
        """Loss of a batch of pairs, whose embeddings are far from those of the others.

        Args:
            pixel_values: as of `encode_video`.
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``, 0 at padding.
            pair_ids: int64 ``(batch,)``; pairs with equal ids are no negatives of each other.
        """
        config = self.config
        video, text = super().forward(pixel_values, input_ids, attention_mask)
        if config.match_loss == "contrastive":
            loss = self._contrast(video.embeds, text.embeds, pair_ids)
        else:
            loss = triplet_loss(
                video.embeds,
                text.embeds,
                config.margin,
                negatives="hardest" if config.match_loss == "triplet" else "all",
                ids=pair_ids,
                group=self.group(),
            )
        return COOKIEOutput(
            loss=_weighted(self, {"match": loss}),
            loss_match=loss,
            video_embeds=video.embeds,
            text_embeds=text.embeds,
        )

    def _contrast(self, query: Tensor, key: Tensor, ids: Tensor | None) -> Tensor:
        """The contrastive losses of both directions, summed."""
        return 2 * so.info_nce(
            query, key, self.config.temperature_init, ids=ids, group=self.group()
        )


class COOKIEForPreTraining(COOKIEForRetrieval):
    """COOKIE with the contrastive losses between modalities, and within each one."""

    def build(self, config: Any) -> None:
        if config.feature_size and config.weights["vcl"]:
            raise ValueError(
                f"{type(self).__name__}: loss_weights['vcl'] must be 0 with feature_size, whose"
                f" images cannot be augmented, got {config.weights['vcl']}"
            )
        super().build(config)

    @property
    def leaves_parameters_unused(self) -> bool:
        """Whether a loss in training may depend on some parameters only."""
        weight = self.config.weights
        return not weight["ccl"] and not (weight["vcl"] and weight["tcl"])

    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        pair_ids: Tensor | None = None,
        view_pixel_values: Tensor | None = None,
        view_input_ids: Tensor | None = None,
        view_attention_mask: Tensor | None = None,
    ) -> COOKIEOutput:
        """Losses of a batch of pairs.

        While training, the colours of the images' views are changed besides.

        Args:
            pixel_values: ``(batch, 3, image_size, image_size)`` or ``(batch, 1, 3, ...)``.
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``, 0 at padding.
            pair_ids: int64 ``(batch,)``; pairs with equal ids are no negatives of each other.
            view_pixel_values: two views of each image, ``(batch, 2, ...)``; needed unless the
                weight of "vcl" is 0.
            view_input_ids: two views of each text, ``(batch, 2, tokens)``; needed unless the weight
                of "tcl" is 0.
            view_attention_mask: like ``view_input_ids``, 0 at padding.
        """
        config, weight = self.config, self.config.weights
        augmented = config.contrast_views == "augmented"
        images, texts = [], []
        if weight["vcl"]:
            views = self._given("vcl", pixel_values, view_pixel_values=view_pixel_values)
            images = list(views[0].unbind(1))
            if self.training:
                rates = (config.jitter, config.grayscale_rate, config.blur_rate)
                images = list(distort(torch.cat(images), *rates).chunk(2))
        if weight["tcl"]:
            views = self._given(
                "tcl",
                input_ids,
                view_input_ids=view_input_ids,
                view_attention_mask=view_attention_mask,
            )
            texts = list(zip(*(view.unbind(1) for view in views), strict=True))
        if weight["ccl"]:  # in front, so that it is the first either way
            images = images if augmented and images else [pixel_values, *images]
            texts = texts if augmented and texts else [(input_ids, attention_mask), *texts]
        # In one pass: the statistics of the batch are those of all views.
        video: list[Tensor] = []
        if images:
            video += self.encode_video(torch.cat(images)).embeds.chunk(len(images))
        text: list[Tensor] = [self.encode_text(*given).embeds for given in texts]
        losses: dict[str, Tensor] = {}
        if weight["ccl"]:
            losses["ccl"] = self._contrast(video[0], text[0], pair_ids)
        for name, views in (("vcl", video), ("tcl", text)):
            if weight[name]:
                losses[name] = so.info_nce(
                    views[-2],
                    views[-1],
                    config.temperature_init,
                    ids=pair_ids,
                    symmetric=False,
                    group=self.group(),
                )
        return COOKIEOutput(
            loss=_weighted(self, losses),
            **{f"loss_{name}": loss for name, loss in losses.items()},
            video_embeds=video[0] if video else None,
            text_embeds=text[0] if text else None,
        )

    def _given(self, loss: str, plain: Tensor, **views: Tensor | None) -> list[Tensor]:
        """The views that a loss needs, of images or of texts."""
        shape = (len(plain), 2, *plain.shape[1:-1])  # but for texts of another length
        for name, view in views.items():
            if view is None or view.shape[:-1] != shape:
                got = None if view is None else tuple(view.shape)
                wanted = ", ".join(map(str, shape))
                raise ValueError(
                    f"{type(self).__name__}: {name} must have shape ({wanted}, ...) unless"
                    f" loss_weights[{loss!r}] is 0, got {got}"
                )
        return [view for view in views.values() if view is not None]


class COOKIEForHashing(TwoTowers):
    """COOKIE's ResNet below a hash layer: images of the same classes have similar binary codes."""

    projects = False
    supports_gradient_checkpointing = False
    config_class = COOKIEConfig
    config: COOKIEConfig
    centres: Tensor
    random_centre: Tensor
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"^(text|shared|text_shared|text_projection|video_pool|text_pool)\.",
        r"^(video|text)_type$",
        r"^video\.(projection|patch_positions|layers)",
    ]

    def build(self, config: Any) -> None:
        if config.feature_size:
            raise ValueError(
                f"{type(self).__name__}: feature_size must be None, got {config.feature_size}"
            )
        self.video = ConvolutionalTower(config)
        self.hash_layer = HashLayer(config.cnn_sizes[-1], config.hash_bits, config.hash_dropout)
        self.register_buffer("centres", torch.zeros(config.hash_classes, config.hash_bits))
        self.register_buffer("random_centre", torch.zeros(config.hash_bits))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            config = self.config
            centres = hash_centres(config.hash_bits, config.hash_classes, config.hash_centres)
            generator = torch.Generator().manual_seed(RANDOM_CENTRE_SEED)
            bits = torch.rand(config.hash_bits, generator=generator, device="cpu")
            init.copy_(self.centres, centres)
            init.copy_(self.random_centre, torch.where(bits < 0.5, -1.0, 1.0))

    def start_missing(self, missing: Sequence[str]) -> list[str]:
        """Centres are not drawn anew, but follow from the configuration."""
        return [name for name in missing if name not in ("centres", "random_centre")]

    def get_input_embeddings(self) -> nn.Module:
        """There are none: this model reads no texts."""
        raise NotImplementedError

    def encode_video(self, pixel_values: Tensor) -> VideoOutput:
        """Codes ``(batch, hash_bits)`` in (-1, 1) of images, as of `COOKIEModel.encode_video`."""
        features = self.video.features(pixel_values).mean((2, 3))
        return VideoOutput(embeds=in_fp32(self.hash_layer, features))

    def forward(self, pixel_values: Tensor, labels: Tensor) -> HashingOutput:
        """Losses of a batch of images.

        Args:
            pixel_values: ``(batch, 3, image_size, image_size)`` or ``(batch, 1, 3, ...)``.
            labels: ``(batch, hash_classes)``, 1 at the classes of each image, one at least.
        """
        wanted = (len(pixel_values), len(self.centres))
        if labels.shape != wanted:
            raise ValueError(
                f"{type(self).__name__}: labels must have shape {wanted}, got {tuple(labels.shape)}"
            )
        weight, codes = self.config.weights, self.encode_video(pixel_values).embeds
        losses: dict[str, Tensor] = {}
        if weight["centre"]:
            targets = hash_targets(self.centres, labels, self.random_centre)
            losses["centre"] = centre_loss(codes, targets)
        if weight["pairwise"]:
            losses["pairwise"] = pairwise_loss(codes, labels, self.group())
        if weight["quantisation"]:
            losses["quantisation"] = quantisation_loss(codes)
        return HashingOutput(
            loss=_weighted(self, losses),
            **{f"loss_{name}": loss for name, loss in losses.items()},
            codes=codes,
        )


def _weighted(model: Any, losses: dict[str, Tensor]) -> Any:
    """The weighted sum of a model's losses."""
    weight = model.config.weights
    if not any(weight[name] for name in losses):
        raise ValueError(
            f"{type(model).__name__}: loss_weights must be positive for one of its losses at least,"
            f" got {model.config.loss_weights}"
        )
    return sum(weight[name] * loss for name, loss in losses.items())


def _normalised(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1)

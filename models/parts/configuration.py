"""Configurations: what the video tower reads, and two towers with fusion layers over both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from svitt_ops import keep_count
from svitt_ops.layout import MAX_BLOCK_SIZE

OFFICIAL = "svitt-official"
"""Value of `compat` that reproduces what the authors' released code does."""
TOKEN_ORDERS = ("standard", "morton", "hilbert")
LOSSES = ("vtc", "vtm", "mlm")
Rule = tuple[str, Callable[[float], bool]]
NOT_NEGATIVE: Rule = ("a number of at least 0", lambda x: 0 <= x < math.inf)
RATE: Rule = ("more than 0 and at most 1", lambda x: 0 < x <= 1)
DROP_RATE: Rule = ("at least 0 and less than 1", lambda x: 0 <= x < 1)


class VideoConfig(PreTrainedConfig):
    """What the video tower of every model here reads."""

    position: ClassVar[str] = "relative"
    """Where positions enter: "relative" as a bias of every attention, "absolute" as an addition to
    the patches."""
    key_bias: ClassVar[bool] = False
    """Whether the key projections have a bias; BEiT's have none."""
    masks_patches: ClassVar[bool] = False
    """Whether the video tower has a token that takes the place of masked patches."""
    compats: ClassVar[tuple[str | None, ...]] = (None, OFFICIAL)
    """Values of `compat`."""

    image_size: int = 224
    """Height and width of a frame, in pixels."""
    patch_size: int = 16
    """Height and width of a patch; divides `image_size`."""
    num_frames: int = 4
    """Frames of a clip."""
    hidden_size: int = 768
    """Width of the video tower."""
    num_hidden_layers: int = 12
    """Layers of the video tower."""
    num_attention_heads: int = 12
    """Heads of the video tower; divides `hidden_size`."""
    intermediate_size: int = 3072
    """Width inside the feed-forward of the video tower."""
    layer_norm_eps: float = 1e-12
    """Epsilon of the video tower's layer norms."""
    layer_scale_init_value: float = 0.1
    """Initial factor of both residual branches; 0 leaves the factors out."""
    drop_path_rate: float = 0.1
    """Stochastic depth of the last layer; grows linearly from 0."""
    initializer_range: float = 0.02
    """Standard deviation of new weights."""
    bias_init_std: float = 0.0
    """Standard deviation of new relative position bias tables."""

    edge_sparsity: bool = True
    """Whether patches attend to some blocks only; False is dense attention."""
    block_size: int = 56
    """Tokens per block (G)."""
    num_local: int = 1
    """Blocks of the local window (K_l)."""
    num_random: int = 3
    """Random blocks per query block (K_r)."""
    eval_pattern_seed: int | None = 0
    """Seed of the random blocks outside training; None draws them anew on each call."""
    keep_rate: float = 0.7
    """Share of the patches that each pruning keeps (q_v); 1 is no node sparsity."""
    prune_layers: list[int] = field(default_factory=lambda: [3, 6, 9])
    """Layers, from 0, after which patches are pruned."""
    prune_by: str = "saliency"
    """What chooses the survivors: "saliency", the attention of [CLS], or "random"."""
    token_order: str = "standard"
    """Order of the patches that the blocks are cut from: "standard", "morton" or "hilbert"."""
    video_pooling: str = "mean"
    """Vector of a clip: "mean" of the surviving patches, or "cls"."""
    compat: str | None = None
    """None, or "svitt-official": what the authors' released code does, see `parts/official.py`."""

    @property
    def grid_size(self) -> int:
        """Patches along a side of a frame."""
        return self.image_size // self.patch_size

    @property
    def official(self) -> bool:
        """Whether to do what the authors' released code does."""
        return self.compat is not None

    @property
    def tower_frames(self) -> int:
        """Frames whose patches attend to each other: all of a clip's, unless a system says less."""
        return self.num_frames

    @property
    def given_features(self) -> int | None:
        """Width of features that are read from files in the place of frames; None: frames are."""
        return None

    @property
    def own_fixed(self) -> list[str]:
        """Fields of this system alone that weights of this configuration cannot be changed in."""
        return []

    @property
    def num_patches(self) -> int:
        """Patches of a clip."""
        return self.num_frames * self.grid_size**2

    def kept_tokens(self) -> list[int]:
        """Patches that enter each layer of the video tower and, last, those that leave it."""
        counts = [self.num_patches]
        for layer in range(self.num_hidden_layers):
            pruned = layer in self.prune_layers
            counts.append(keep_count(self.keep_rate, counts[-1]) if pruned else counts[-1])
        return counts

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("prune_layers", "multimodal_prune_layers"):
            if isinstance(layers := getattr(self, name, None), Sequence):
                setattr(self, name, list(layers))
        self.check()

    def check(self) -> None:
        """Raise a ValueError that names the first field whose value cannot be."""
        self._check_counts("image_size", "patch_size", "num_frames", "hidden_size", "block_size")
        self._check_counts("num_hidden_layers", "num_attention_heads", "intermediate_size")
        self._check_counts("num_local", "num_random", least=0)
        self._check_divides("patch_size", "image_size")
        self._check_heads("num_attention_heads", "hidden_size")
        if self.edge_sparsity and self.block_size > MAX_BLOCK_SIZE:
            self._refuse("block_size", f"1 to {MAX_BLOCK_SIZE}", self.block_size)
        self._check_numbers(RATE, "keep_rate")
        self._check_numbers(DROP_RATE, "drop_path_rate")
        self._check_numbers(NOT_NEGATIVE, "layer_norm_eps", "layer_scale_init_value")
        self._check_numbers(NOT_NEGATIVE, "initializer_range", "bias_init_std")
        if not isinstance(self.eval_pattern_seed, int | None):
            self._refuse("eval_pattern_seed", "an integer or None", self.eval_pattern_seed)
        self._check_one_of("edge_sparsity", (True, False))
        self._check_one_of("token_order", TOKEN_ORDERS)
        self._check_one_of("prune_by", ("saliency", "random"))
        self._check_one_of("video_pooling", ("mean", "cls"))
        self._check_one_of("compat", self.compats)
        self._check_layers("prune_layers", self.num_hidden_layers)
        if self.compat == OFFICIAL and self.num_local > 1:
            self._refuse("num_local", f"0 or 1 with compat={OFFICIAL!r}", self.num_local)

    def _check_only(self, values: dict[str, object], why: str) -> None:
        """Refuse other values of fields that have one only."""
        for name, value in values.items():
            if getattr(self, name) != value:
                self._refuse(name, f"{value}: {why}", getattr(self, name))

    def _check_colours(self) -> None:
        """Refuse what is no mean or deviation of three colours."""
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or len(values) != 3:
                self._refuse(name, "three numbers", values)
        if min(self.image_std) <= 0:
            self._refuse("image_std", "three positive numbers", self.image_std)

    def _check_counts(self, *names: str, least: int = 1) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                self._refuse(name, f"an integer of at least {least}", value)

    def _check_numbers(self, rule: Rule, *names: str) -> None:
        wanted, fits = rule
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not fits(value):
                self._refuse(name, wanted, value)

    def _check_divides(self, name: str, whole: str) -> None:
        if getattr(self, whole) % getattr(self, name):
            self._refuse(
                name, f"a divisor of {whole} ({getattr(self, whole)})", getattr(self, name)
            )

    def _check_heads(self, name: str, width: str) -> None:
        self._check_divides(name, width)
        size = getattr(self, width) // getattr(self, name)
        if not 8 <= size <= 256:  # as the ops want it
            self._refuse(name, f"such that {width} / {name} is 8 to 256", getattr(self, name))

    def _check_one_of(self, name: str, choices: tuple[object, ...]) -> None:
        if getattr(self, name) not in choices:
            self._refuse(name, f"one of {choices}", getattr(self, name))

    def _check_layers(self, name: str, count: int) -> None:
        layers = getattr(self, name)
        if not isinstance(layers, Sequence) or any(layer not in range(count) for layer in layers):
            self._refuse(name, f"a list of layers 0 to {count - 1}", layers)

    def _refuse(self, name: str, wanted: str, value: object) -> None:
        raise ValueError(f"{type(self).__name__}: {name} must be {wanted}, got {value!r}")


class TwoTowersConfig(VideoConfig):
    """Two towers, fusion layers over both, and losses; the defaults are SViTT's base model's."""

    losses: ClassVar[tuple[str, ...]] = LOSSES
    """Keys of `loss_weights`."""

    multimodal_keep_rate: float = 0.1
    """Share of the surviving patches that multimodal pruning keeps (q_m); 1 is none."""
    multimodal_prune_layers: list[int] = field(default_factory=lambda: [1])
    """Fusion layers, from 0, that prune; it takes effect from the next fusion layer."""
    multimodal_prune_by: str = "cls"
    """What chooses: the cross-attention of the text's "cls", its "mean" over the text, "random"."""
    vocab_size: int = 30522
    """Pieces of the tokenizer."""
    text_hidden_size: int = 768
    """Width of the text tower and of the fusion layers."""
    text_num_hidden_layers: int = 12
    """Layers of the text tower and fusion layers together."""
    fusion_layer: int = 9
    """The first layer that is a fusion layer."""
    text_num_attention_heads: int = 12
    """Heads of the text and fusion layers; divides `text_hidden_size`."""
    text_intermediate_size: int = 3072
    """Width inside the feed-forward of the text and fusion layers."""
    text_dropout: float = 0.0
    """Dropout of hidden states in the text and fusion layers; BERT's is 0.1."""
    decoder_layers: int = 3
    """Layers of the answer decoder, which models for question answering have."""
    text_layer_norm_eps: float = 1e-12
    """Epsilon of the text and fusion layers' layer norms."""
    max_position_embeddings: int = 512
    """Longest text, in tokens."""
    type_vocab_size: int = 2
    """Token types, of which the first is used; 0 leaves the embedding out."""
    pad_token_id: int = 0
    """Piece that pads texts."""
    projection_dim: int = 256
    """Width of the embeddings of clips and texts."""
    temperature_init: float = 0.07
    """Initial temperature of the contrastive loss, which is learned."""
    temperature_min: float = 0.001
    """Least temperature that `clamp_temperature` leaves."""
    temperature_max: float = 0.5
    """Greatest temperature that `clamp_temperature` leaves."""
    loss_weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LOSSES, 1))
    """Weights of "vtc", "vtm" and "mlm"; a weight of 0 skips that pass, one left out is 1."""
    hard_negatives: bool = True
    """Whether the pairs that do not match are drawn by similarity; False: uniformly."""

    def check(self) -> None:
        """Raise a ValueError that names the first field whose value cannot be."""
        super().check()
        self._check_counts("vocab_size", "text_hidden_size", "text_num_attention_heads")
        self._check_counts("text_intermediate_size", "max_position_embeddings", "projection_dim")
        self._check_counts("decoder_layers")
        self._check_counts("text_num_hidden_layers", "fusion_layer", "type_vocab_size", least=0)
        self._check_heads("text_num_attention_heads", "text_hidden_size")
        self._check_numbers(RATE, "multimodal_keep_rate")
        self._check_numbers(DROP_RATE, "text_dropout")
        self._check_one_of("hard_negatives", (True, False))
        self._check_one_of("multimodal_prune_by", ("cls", "mean", "random"))
        if self.fusion_layer > self.text_num_hidden_layers:
            self._refuse("fusion_layer", f"0 to {self.text_num_hidden_layers}", self.fusion_layer)
        self._check_layers("multimodal_prune_layers", self.num_fusion_layers)
        self._check_numbers(NOT_NEGATIVE, "temperature_min", "temperature_init", "temperature_max")
        if not 0 < self.temperature_min <= self.temperature_init <= self.temperature_max:
            limits = f"{self.temperature_min} to {self.temperature_max}"
            self._refuse("temperature_init", limits, self.temperature_init)
        self._check_numbers(NOT_NEGATIVE, "text_layer_norm_eps")
        weights = self.loss_weights
        if not isinstance(weights, dict) or set(weights) - set(self.losses):
            self._refuse("loss_weights", f"keyed by {self.losses}", weights)
        for weight in weights.values():
            if not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
                self._refuse("loss_weights", "numbers of at least 0", weights)
        if not any(self.weights.values()):
            self._refuse("loss_weights", "positive for one loss at least", weights)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every loss."""
        return {name: self.loss_weights.get(name, 1) for name in self.losses}

    @property
    def num_fusion_layers(self) -> int:
        """Layers that attend over the video too."""
        return self.text_num_hidden_layers - self.fusion_layer

    @property
    def prunes_multimodally(self) -> bool:
        """Whether fusion layers prune. The released code never does, whatever its recipe says."""
        return self.multimodal_keep_rate < 1 and not self.official

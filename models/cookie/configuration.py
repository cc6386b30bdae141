"""The configuration of COOKIE."""

from __future__ import annotations

import copy
from dataclasses import field
from typing import Any, ClassVar

from transformers import ResNetConfig

from svitt_ops.models.parts.configuration import DROP_RATE, NOT_NEGATIVE, TwoTowersConfig

FIXED: dict[str, object] = {
    "edge_sparsity": False,
    "keep_rate": 1,
    "multimodal_keep_rate": 1,
    "layer_scale_init_value": 0,
    "drop_path_rate": 0,
    "video_pooling": "mean",
}
"""Fields of other towers, and their only value here."""
WEIGHTS = {
    **{"ccl": 1.0, "vcl": 1.0, "tcl": 1.0, "match": 1.0},
    **{"centre": 1.0, "pairwise": 0.2, "quantisation": 0.05},
}
"""Weights of the losses by default."""


class COOKIEConfig(TwoTowersConfig):
    """COOKIE: a ResNet and a BERT, below transformer layers whose weights both share.

    Source: COOKIE (ICCV 2021); the defaults are its ResNet-50 model's. What the paper leaves open
    is said to be.
    """

    model_type = "cookie"
    compats: ClassVar[tuple[str | None, ...]] = (None,)
    losses: ClassVar[tuple[str, ...]] = tuple(WEIGHTS)

    image_size: int = 512
    """Height and width of an image, in pixels."""
    patch_size: int = 32
    """Pixels along a side for a feature of the ResNet: 4, doubled by each stage but the first."""
    image_mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Mean of the three colours, of pixels from 0 to 1, that the ResNet's weights want taken out.
    What `encode_video` takes has mean and deviation 0.5 taken out, as for every model here."""
    image_std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Standard deviation of the three colours that these weights want."""
    num_frames: int = 1
    """Frames of a video's features; an image is one frame."""
    feature_size: int | None = None
    """Width of given features, as videos have them; None: the ResNet makes them of images."""
    cnn_depths: list[int] = field(default_factory=lambda: [3, 4, 6, 3])
    """Layers of each stage of the ResNet; a ResNet-101 has [3, 4, 23, 3]."""
    cnn_sizes: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048])
    """Channels that leave each stage."""
    cnn_stem: int = 64
    """Channels that leave the first convolution."""
    cnn_layer: str = "bottleneck"
    """Kind of the layers: "bottleneck", or "basic"."""
    cnn_groups: int = 1
    """Groups of the 3 x 3 convolutions; more than one is a ResNeXt, of bottlenecks."""
    cnn_group_width: int = 64
    """Channels of a group in the first stage; ResNeXt-101 32x8d has 32 groups of 8."""
    cnn_norm: str = "batch"
    """What normalises while training: the statistics of the "batch", of all processes, or "frozen"
    ones, those of the weights; open."""
    hidden_size: int = 1024
    """Width of the transformer layers over features and words, and of the embeddings."""
    num_hidden_layers: int = 1
    """Layers of the text-aligned visual transformer (TAV-TE), over the image's features alone."""
    num_attention_heads: int = 8
    """Heads of the transformer layers; divides `hidden_size`."""
    intermediate_size: int = 1024
    """Width inside the feed-forward of the transformer layers."""
    layer_norm_eps: float = 1e-5
    """Epsilon of the transformer layers' norms."""
    dropout: float = 0.0
    """Dropout of hidden states in the transformer layers; open."""
    shared_layers: int = 2
    """Layers that features and words go through, each alone (WS-TE)."""
    weight_sharing: str = "shared"
    """Whether both go through the same ones: "shared"; "unshared": each has its own; "fc": shared
    ones without attention."""
    pooling: str = "mean"
    """How tokens become a vector: their "mean", or "gpo", a learned mean of each dimension's sorted
    values; the mean in pretraining is open."""
    gpo_size: int = 32
    """Width of GPO's positions and of its recurrent layer."""
    edge_sparsity: bool = False
    """Fixed: attention is dense."""
    keep_rate: float = 1.0
    """Fixed: no feature is pruned."""
    prune_layers: list[int] = field(default_factory=list)
    """Of no effect."""
    multimodal_keep_rate: float = 1.0
    """Fixed: there are no fusion layers."""
    multimodal_prune_layers: list[int] = field(default_factory=list)
    """Empty: there are no fusion layers."""
    layer_scale_init_value: float = 0.0
    """Fixed: layers have no scales."""
    drop_path_rate: float = 0.0
    """Fixed: no layer is dropped."""
    fusion_layer: int = 12
    """Equal to `text_num_hidden_layers`: there are no fusion layers."""
    projection_dim: int = 1024
    """Equal to `hidden_size`: embeddings are what is pooled."""
    temperature_init: float = 0.07
    """Temperature of the contrastive losses, which is not learned; open."""
    loss_weights: dict[str, float] = field(default_factory=lambda: dict(WEIGHTS))
    """Weights of the losses, a weight of 0 skips that pass, one left out is the default: of
    pretraining "ccl", between modalities, "vcl", of an image with itself, "tcl", of a text with
    itself; of retrieval "match"; of hashing "centre", "pairwise" and "quantisation"."""
    contrast_views: str = "plain"
    """What images and texts are contrasted with each other: the "plain" ones, or, where there are
    any, the first "augmented" ones, which saves a pass; open."""
    contrast_scope: str = "global"
    """Where negatives come from: the "global" batch of all processes, or each one's own, "local";
    open."""
    jitter: float = 0.4
    """Greatest change of an augmented image's brightness and contrast; open."""
    grayscale_rate: float = 0.2
    """Share of the augmented images that lose their colours; open."""
    blur_rate: float = 0.5
    """Share of the augmented images that are blurred; open."""
    match_loss: str = "triplet"
    """Loss of retrieval: "triplet", with the hardest negative of the batch (VSE++), "sum", with all
    of them, or "contrastive", as in pretraining."""
    feature_drop: float = 0.0
    """Greatest share of an image's features, or a video's frames, that are left out of the pooling
    in training; 0.2 in the released training of GPO."""
    margin: float = 0.2
    """By how much pairs that match are to be more similar than others, of the first two; open."""
    hash_bits: int = 64
    """Bits of a hash code."""
    hash_classes: int = 80
    """Classes of the images that are hashed, at most."""
    hash_centres: str = "hadamard"
    """Codes of the classes: rows of a "hadamard" matrix, where there are enough, or "random"
    balanced ones."""
    hash_dropout: float = 0.5
    """Dropout in the hash layer."""

    @property
    def grid_size(self) -> int:
        """Features along a side of an image; given features are one for each frame."""
        return 1 if self.feature_size else self.image_size // self.patch_size

    @property
    def given_features(self) -> int | None:
        """Width of features that are read from files; None: images are."""
        return self.feature_size

    @property
    def own_fixed(self) -> list[str]:
        """Fields of this system alone that weights of this configuration cannot be changed in."""
        own = ["feature_size", "cnn_depths", "cnn_sizes", "cnn_stem", "cnn_layer", "cnn_groups"]
        return [*own, "cnn_group_width", "shared_layers", "weight_sharing"]

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every loss."""
        return WEIGHTS | self.loss_weights

    def resnet(self) -> ResNetConfig:
        """The configuration of the ResNet."""
        return ResNetConfig(
            depths=list(self.cnn_depths),
            hidden_sizes=list(self.cnn_sizes),
            embedding_size=self.cnn_stem,
            layer_type=self.cnn_layer,
        )

    def of_shared_layers(self) -> Any:
        """The same, with the widths of the transformer layers as those of a text layer."""
        found = copy.copy(self)
        found.text_hidden_size = self.hidden_size
        found.text_num_attention_heads = self.num_attention_heads
        found.text_intermediate_size = self.intermediate_size
        found.text_layer_norm_eps = self.layer_norm_eps
        found.text_dropout = self.dropout
        return found

    def check(self) -> None:
        """Raise a ValueError that names the first field whose value cannot be."""
        self._check_only(FIXED, "COOKIE has no such layers")
        super().check()
        self._check_colours()
        if self.num_fusion_layers:
            self._refuse("fusion_layer", f"{self.text_num_hidden_layers}", self.fusion_layer)
        if self.projection_dim != self.hidden_size:
            self._refuse("projection_dim", f"{self.hidden_size}, hidden_size", self.projection_dim)
        self._check_counts("shared_layers", least=0)
        self._check_counts("gpo_size", "hash_bits", "hash_classes")
        if self.feature_size is not None:
            self._check_counts("feature_size")
        elif self.num_frames != 1:
            self._refuse("num_frames", "1 without feature_size", self.num_frames)
        self._check_numbers(DROP_RATE, "dropout", "hash_dropout", "feature_drop")
        self._check_numbers(NOT_NEGATIVE, "margin")
        share = ("a number from 0 to 1", lambda x: 0 <= x <= 1)
        self._check_numbers(share, "jitter", "grayscale_rate", "blur_rate")
        for name, choices in {
            "cnn_layer": ("bottleneck", "basic"),
            "cnn_norm": ("batch", "frozen"),
            "weight_sharing": ("shared", "unshared", "fc"),
            "pooling": ("mean", "gpo"),
            "contrast_views": ("plain", "augmented"),
            "contrast_scope": ("global", "local"),
            "match_loss": ("triplet", "sum", "contrastive"),
            "hash_centres": ("hadamard", "random"),
        }.items():
            self._check_one_of(name, choices)
        self._check_cnn()

    def _check_cnn(self) -> None:
        self._check_counts("cnn_stem", "cnn_groups", "cnn_group_width")
        for name in ("cnn_depths", "cnn_sizes"):
            values = getattr(self, name)
            counts = isinstance(values, list) and values
            if not counts or any(not isinstance(x, int) or x < 1 for x in values):
                self._refuse(name, "a list of positive integers", values)
        if len(self.cnn_depths) != len(self.cnn_sizes):
            self._refuse("cnn_sizes", f"as many as cnn_depths, {self.cnn_depths}", self.cnn_sizes)
        stride = 2 ** (len(self.cnn_depths) + 1)
        if self.patch_size != stride:
            self._refuse(
                "patch_size", f"{stride}, that of {len(self.cnn_depths)} stages", self.patch_size
            )
        if self.cnn_groups > 1 and self.cnn_layer != "bottleneck":
            self._refuse("cnn_groups", "1 with cnn_layer='basic'", self.cnn_groups)

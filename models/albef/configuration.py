"""The configuration of ALBEF."""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar

from svitt_ops.models.parts.configuration import TwoTowersConfig

OFFICIAL = "albef-official"
"""Value of `compat` that reproduces what the authors' released code does."""
DENSE: dict[str, object] = {
    "num_frames": 1,
    "edge_sparsity": False,
    "keep_rate": 1,
    "multimodal_keep_rate": 1,
}
"""Fields of clips and of sparsity, and their only value."""


class ALBEFConfig(TwoTowersConfig):
    """ALBEF: a ViT, a text tower and fusion layers, taught by a momentum twin.

    Source: ALBEF (NeurIPS 2021); the defaults are the base model's in pretraining.
    """

    model_type = "albef"
    position: ClassVar[str] = "absolute"
    key_bias: ClassVar[bool] = True
    compats: ClassVar[tuple[str | None, ...]] = (None, OFFICIAL)

    image_size: int = 256
    """Height and width of an image, in pixels."""
    image_mean: list[float] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    """Mean of the three colours, of pixels from 0 to 1, that the tower's weights want taken out:
    CLIP's, as the authors have it. What `encode_video` takes has mean and deviation 0.5 taken out,
    as for every model here."""
    image_std: list[float] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])
    """Standard deviation of the three colours that these weights want."""
    num_frames: int = 1
    """Fixed: an image is one frame."""
    layer_norm_eps: float = 1e-6
    """Epsilon of the image tower's layer norms."""
    layer_scale_init_value: float = 0.0
    """Initial factor of both residual branches; 0 leaves the factors out."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the last layer; grows linearly from 0."""
    edge_sparsity: bool = False
    """Fixed: attention is dense."""
    keep_rate: float = 1.0
    """Fixed: no patch is pruned."""
    prune_layers: list[int] = field(default_factory=list)
    """Of no effect."""
    multimodal_keep_rate: float = 1.0
    """Fixed: no patch is pruned."""
    multimodal_prune_layers: list[int] = field(default_factory=list)
    """Of no effect."""
    video_pooling: str = "cls"
    """Vector of an image: "cls", or "mean" of the patches."""
    fusion_layer: int = 6
    """The first layer that is a fusion layer."""
    decoder_layers: int = 6
    """Layers of the answer decoder, which models for question answering have."""
    unpaired_layers: int = 0
    """Fusion layers that are not doubled where a text is about two images."""
    momentum: float | None = 0.995
    """How slowly the twin follows; None: there is no twin, which is enough for use, and for the
    tasks that need no queues."""
    queue_size: int = 65536
    """Embeddings of earlier batches that the contrastive loss compares with."""
    alpha: float = 0.4
    """Share of the twin in the targets of the losses."""
    alpha_warmup_steps: int | None = 0
    """Steps in which `alpha` grows linearly from 0; None: those of the first epoch, as the authors
    have it, which a run fills in (`fit_epoch`)."""
    compat: str | None = None
    """None, or "albef-official": ranking of answers counts their first token twice, pretraining
    takes no notice of equal ids, and each process contrasts its part of a batch with the queues and
    its own keys, not those of the other processes, as in the authors' released code."""

    @property
    def queues_ids(self) -> bool:
        """Whether the queues know whose embeddings they hold."""
        return True

    @property
    def word_axis(self) -> int:
        """Axis over which the distillation of masked words is normalised."""
        return -1

    @property
    def distils_answers(self) -> bool:
        """Whether the twin has a share in the targets of answers."""
        return True

    def check(self) -> None:
        """Raise a ValueError that names the first field whose value cannot be."""
        super().check()
        self._check_only(DENSE, f"{type(self).__name__} is of images, and dense")
        self._check_colours()
        self._check_counts("queue_size")
        self._check_counts("unpaired_layers", least=0)
        if self.alpha_warmup_steps is not None:
            self._check_counts("alpha_warmup_steps", least=0)
        if self.unpaired_layers > self.num_fusion_layers:
            self._refuse("unpaired_layers", f"0 to {self.num_fusion_layers}", self.unpaired_layers)
        share = ("a number from 0 to 1", lambda x: 0 <= x <= 1)
        self._check_numbers(share, "alpha")
        if self.momentum is not None:
            self._check_numbers(share, "momentum")

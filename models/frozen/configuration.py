"""The configuration of SViTT on Frozen."""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar

from svitt_ops.models.parts.configuration import TwoTowersConfig


class FrozenConfig(TwoTowersConfig):
    """SViTT on Frozen: two towers without fusion, contrastive loss only.

    The video tower is a ViT with absolute positions over (frame, patch), the text tower a
    DistilBERT. The temperature stays what it is.

    Source: SViTT (CVPR 2023), supplement B.2; Frozen in time (ICCV 2021).
    """

    model_type = "svitt-frozen"
    position: ClassVar[str] = "absolute"
    key_bias: ClassVar[bool] = True

    attention: str = "joint"
    """Of the patches: "joint" over space and time, as SViTT's; "divided", the original's attention
    over time and then over space, which is dense."""
    zero_init_time: bool = True
    """Whether divided attention over time starts at zero, as the original's; its queries and keys
    then stay there. False: like any other weights."""
    layer_norm_eps: float = 1e-6
    """Epsilon of the video tower's layer norms."""
    layer_scale_init_value: float = 0.0
    """Initial factor of both residual branches; 0 leaves the factors out."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the last layer; grows linearly from 0."""
    video_pooling: str = "cls"
    """Vector of a clip: "mean" of the surviving patches, or "cls"."""
    text_num_hidden_layers: int = 6
    """Layers of the text tower."""
    fusion_layer: int = 6
    """Equal to `text_num_hidden_layers`: there are no fusion layers."""
    multimodal_prune_layers: list[int] = field(default_factory=list)
    """Empty: there are no fusion layers."""
    type_vocab_size: int = 0
    """Token types, of which the first is used; 0 leaves the embedding out."""
    temperature_init: float = 0.05
    """Temperature of the contrastive loss, which is not learned."""
    loss_weights: dict[str, float] = field(default_factory=lambda: {"vtc": 1, "vtm": 0, "mlm": 0})
    """Fixed: there is the contrastive loss only."""

    def check(self) -> None:
        """Raise a ValueError that names the first field whose value cannot be."""
        super().check()
        self._check_one_of("attention", ("joint", "divided"))
        self._check_one_of("zero_init_time", (True, False))
        if self.attention == "divided":
            for name, dense in (("edge_sparsity", False), ("keep_rate", 1)):
                if getattr(self, name) != dense:
                    self._refuse(name, f"{dense} with attention='divided'", getattr(self, name))
            if self.token_order != "standard":
                self._refuse("token_order", "'standard' with attention='divided'", self.token_order)
        if self.num_fusion_layers:
            self._refuse("fusion_layer", f"{self.text_num_hidden_layers}", self.fusion_layer)
        if self.weights["vtm"] or self.weights["mlm"]:
            self._refuse("loss_weights", "0 for vtm and mlm", self.loss_weights)
        if self.compat is not None:
            self._refuse("compat", "None: there is no released code", self.compat)

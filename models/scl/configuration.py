"""The configuration of SCL."""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar

from svitt_ops.models.parts.configuration import NOT_NEGATIVE, TwoTowersConfig

OFFICIAL = "scl-official"
"""Value of `compat` that reproduces what the authors' released code does."""
SCL_LOSSES = ("vtc", "vtm", "mlm", "scl")
FIXED: dict[str, object] = {
    **{"edge_sparsity": False, "keep_rate": 1, "multimodal_keep_rate": 1},
    **{"hard_negatives": False, "video_pooling": "cls"},
}
"""Fields that have one value only."""


class SCLConfig(TwoTowersConfig):
    """SCL: CLIP's image tower, RoBERTa, and two streams of fusion layers, one for each.

    Of several frames every one has its [CLS], which attends over all of them; patches attend over
    their own frame.

    Source: Seeing What You Miss: Vision-Language Pre-training with Semantic Completion Learning
    (CVPR 2023); the defaults are the base model's in pretraining on images.
    """

    model_type = "scl"
    position: ClassVar[str] = "absolute"
    key_bias: ClassVar[bool] = True
    compats: ClassVar[tuple[str | None, ...]] = (None, OFFICIAL)
    losses: ClassVar[tuple[str, ...]] = SCL_LOSSES

    image_size: int = 288
    """Height and width of a frame, in pixels."""
    image_mean: list[float] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    """Mean of the three colours, of pixels from 0 to 1, that the tower's weights want taken out.
    What `encode_video` takes has mean and deviation 0.5 taken out, as for every model here."""
    image_std: list[float] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])
    """Standard deviation of the three colours that these weights want."""
    num_frames: int = 1
    """Frames of a clip; 1: images, without positions of frames."""
    max_frames: int = 8
    """Frames that there are positions for."""
    num_hidden_layers: int = 11
    """Layers of the image tower: CLIP's, without its last one."""
    layer_norm_eps: float = 1e-5
    """Epsilon of the image tower's layer norms."""
    layer_scale_init_value: float = 0.0
    """Initial factor of both residual branches; 0 leaves the factors out."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the last layer; grows linearly from 0."""
    edge_sparsity: bool = False
    """Fixed: what attends what depends on the frames alone."""
    keep_rate: float = 1.0
    """Fixed: no patch is pruned."""
    prune_layers: list[int] = field(default_factory=list)
    """Of no effect."""
    multimodal_keep_rate: float = 1.0
    """Fixed: no patch is pruned."""
    multimodal_prune_layers: list[int] = field(default_factory=list)
    """Of no effect."""
    video_pooling: str = "cls"
    """Fixed: the vector of a clip is the mean of its frames' [CLS]."""
    vocab_size: int = 50265
    """Pieces of the tokenizer."""
    text_num_hidden_layers: int = 18
    """Layers of the text tower, and those of a fusion stream."""
    fusion_layer: int = 12
    """Layers of the text tower; the others are both fusion streams'."""
    text_layer_norm_eps: float = 1e-5
    """Epsilon of the text tower's layer norms."""
    fusion_intermediate_size: int = 3072
    """Width inside the feed-forward of the fusion layers."""
    fusion_layer_norm_eps: float = 1e-12
    """Epsilon of the layer norms of the fusion layers and of the head for masked words."""
    type_vocab_size: int = 1
    """Token types of the text tower, of which the first is used; 0 leaves the embedding out."""
    pad_token_id: int = 1
    """Piece that pads texts."""
    projection_dim: int = 512
    """Width of the embeddings of clips and texts."""
    loss_weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SCL_LOSSES, 1))
    """Weights of "vtc", "vtm", "mlm" and "scl"; a weight of 0 skips that pass, one left out is 1.
    In retrieval "vtm" is that of choosing a clip's text among false ones."""
    hard_negatives: bool = False
    """Fixed: pairs that do not match are drawn uniformly."""
    patch_mask_share: float = 0.8
    """Share of the patches that semantic completion removes, in every frame the same."""
    text_mask_share: float = 0.4
    """Share of a text's pieces that semantic completion masks, drawn with replacement."""
    completion_temperature: float = 0.03
    """Temperature of semantic completion, which is not learned."""
    completion_symmetric: bool = True
    """Whether complete features are also told among all recovered ones, as the authors' code does;
    the paper's equation 2 can be read as without."""
    false_texts: int = 15
    """In retrieval, texts of other clips that a clip's own is to be chosen among."""
    answers: list[str] | None = None
    """Of a model for question answering: its classes."""
    compat: str | None = None
    """None, or "scl-official": completion of clips compares features that are normalised over the
    frames, that of images takes a process's own texts as negatives, retrieval contrasts the first
    clip of a batch alone, and the temperature has no limits, as in the authors' released code."""

    @property
    def tower_frames(self) -> int:
        """Frames that patches have places in: places are the same in all."""
        return 1

    @property
    def own_fixed(self) -> list[str]:
        """Fields of this system alone that weights of this configuration cannot be changed in."""
        fixed = ["fusion_intermediate_size"]
        fixed += ["max_frames"] if self.num_frames > 1 else []
        return fixed if self.answers is None else [*fixed, "answers"]

    def check(self) -> None:
        """Raise a ValueError that names the first field whose value cannot be."""
        super().check()
        self._check_only(FIXED, "SCL has no other")
        self._check_colours()
        self._check_counts("max_frames", "false_texts", "fusion_intermediate_size")
        if self.num_frames > self.max_frames:
            self._refuse("num_frames", f"at most max_frames ({self.max_frames})", self.num_frames)
        if not self.num_fusion_layers:
            self._refuse(
                "fusion_layer", f"0 to {self.text_num_hidden_layers - 1}", self.fusion_layer
            )
        self._check_numbers(NOT_NEGATIVE, "fusion_layer_norm_eps")
        self._check_one_of("completion_symmetric", (True, False))
        inside = ("more than 0 and less than 1", lambda x: 0 < x < 1)
        self._check_numbers(inside, "patch_mask_share", "text_mask_share")
        self._check_numbers(("positive", lambda x: x > 0), "completion_temperature")
        answers = self.answers
        texts = isinstance(answers, list) and all(isinstance(text, str) for text in answers)
        if answers is not None and not (texts and 0 < len({*answers}) == len(answers)):
            self._refuse("answers", "None, or distinct texts, one at least", answers)

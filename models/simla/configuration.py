"""The configuration of SIMLA."""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar

from svitt_ops.models.albef.configuration import ALBEFConfig

OFFICIAL = "simla-official"
"""Value of `compat` that reproduces what the authors' released code does."""
LOSSES = ("vtc", "vtm", "mlm", "mim", "psl")


class SIMLAConfig(ALBEFConfig):
    """SIMLA: a ViT, and one encoder that reads texts, texts over images and images over texts.

    Source: SIMLA (ECCV 2022); the defaults are the base model's in pretraining.
    """

    model_type = "simla"
    compats: ClassVar[tuple[str | None, ...]] = (None, OFFICIAL)
    losses: ClassVar[tuple[str, ...]] = LOSSES
    masks_patches: ClassVar[bool] = True

    fusion_layer: int = 0
    """Fixed: every layer can attend over the other modality."""
    unpaired_layers: int = 6
    """Layers that are not doubled where a text is about two images; they read them by turns."""
    type_vocab_size: int = 0
    """Token types, of which the first is used; 0 leaves the embedding out."""
    image_vocab_size: int = 8192
    """Visual tokens."""
    tokenizer_width: int = 16
    """Width of the first layers of the tokenizer that makes them; DALL-E's is 256."""
    tokenizer_depth: int = 1
    """Blocks of each group of its layers; of DALL-E's 2."""
    masked_patches: int = 75
    """The most patches of an image that are masked: of 256 in the released code, as of BEiT's
    196."""
    concept_source: str = "projection"
    """What pseudo-labels are predicted from: an image's "projection", as in the released code, or
    its "cls" state, as in the paper."""
    keyword_rule: str = "votes"
    """What makes words an image's labels: "votes" of the heads, as in the released code, or the
    "mean" of their attention, as in the paper."""
    keyword_layer: int = -1
    """Layer whose attention of a text's [CLS] over the text chooses; -1 is the last."""
    keyword_votes: int = 4
    """Words that each head votes for; with "mean", the labels."""
    keywords: int = 5
    """The most labels of an image, with "votes"."""
    keyword_excluded_ids: list[int] = field(default_factory=list)
    """Pieces that are no labels, besides the text's first one, [CLS]: such as [SEP]'s."""
    loss_weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LOSSES, 1))
    """Weights of "vtc", "vtm", "mlm", "mim" and "psl"; a weight of 0 skips that pass, one left out
    is 1."""
    compat: str | None = None
    """None, or "simla-official": the distillation of masked words is normalised over the text's
    places, the twin reads the model's own words and images for masked patches and labels, queues do
    not know ids, processes contrast with their own keys and the queues alone, answers have no
    distillation, and their ranking counts the first token twice."""

    @property
    def queues_ids(self) -> bool:
        """Whether the queues know whose embeddings they hold."""
        return not self.official

    @property
    def word_axis(self) -> int:
        """Axis over which the distillation of masked words is normalised."""
        return 1 if self.official else -1

    @property
    def distils_answers(self) -> bool:
        """Whether the twin has a share in the targets of answers."""
        return not self.official

    def check(self) -> None:
        """Raise a ValueError that names the first field whose value cannot be."""
        super().check()
        if self.fusion_layer:
            self._refuse("fusion_layer", "0: every layer fuses", self.fusion_layer)
        if self.text_hidden_size != self.hidden_size:
            wanted = f"hidden_size ({self.hidden_size}): one encoder reads both"
            self._refuse("text_hidden_size", wanted, self.text_hidden_size)
        self._check_counts("tokenizer_width", "tokenizer_depth")
        self._check_counts("image_vocab_size", "masked_patches", "keyword_votes", "keywords")
        if self.masked_patches > self.num_patches:
            self._refuse("masked_patches", f"1 to {self.num_patches}", self.masked_patches)
        self._check_one_of("concept_source", ("projection", "cls"))
        self._check_one_of("keyword_rule", ("votes", "mean"))
        count = self.text_num_hidden_layers
        if self.keyword_layer not in range(-count, count):
            self._refuse("keyword_layer", f"{-count} to {count - 1}", self.keyword_layer)
        if self.weights["mim"] and self.num_patches >= self.max_position_embeddings:
            wanted = f"more than the {self.num_patches} patches, with the loss 'mim'"
            self._refuse("max_position_embeddings", wanted, self.max_position_embeddings)

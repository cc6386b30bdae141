"""The configuration of SoftMask."""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar

from svitt_ops.models.albef.configuration import ALBEFConfig
from svitt_ops.models.parts.configuration import NOT_NEGATIVE

LOSSES = ("vtc", "vtm", "mlm", "soft")


class SoftMaskConfig(ALBEFConfig):
    """SoftMask: ALBEF, which learns from images whose regions of a word are softly masked.

    There is no released code, and the paper leaves open what is marked so; these are choices.

    Source: Soft masking for vision-language pretraining (CVPR 2023); the defaults are the base
    model's in pretraining.
    """

    model_type = "softmask"
    compats: ClassVar[tuple[str | None, ...]] = (None,)
    losses: ClassVar[tuple[str, ...]] = LOSSES

    mask_source: str = "gradcam"
    """What a mask is made of: the "gradcam" of a word, its "cross_attention", which the paper
    compares with, "random" numbers, or "none": there is no mask, and no loss of masked images."""
    mask_layer: int = 8
    """Layer, counted from 0 at the first text layer, whose attention makes masks; open in the
    paper: ALBEF's for grounding."""
    mask_normalization: str = "max"
    """How a word's map comes to lie in [0, 1]: over its "max", or from its "minmax"; open."""
    mask_compensation: str = "add"
    """How a mask comes to its mass: what is "add"ed to every patch, "multiply", where a factor can,
    or "none", which leaves it as it is; open."""
    mask_mass: float = 0.5
    """Share of the patches that a mask's sum is."""
    mask_keeps: bool = False
    """Whether a mask is what stays of a patch, not what is taken away; the paper's mass, a half, is
    the same for both, so open."""
    mask_excluded_ids: list[int] = field(default_factory=list)
    """Pieces that no mask is made from, besides a text's first one, [CLS]: such as [SEP]'s."""
    masks_words_too: bool = False
    """Whether masked words are predicted from softly masked images; open."""
    reads_masked_text: bool = True
    """Whether the contrastive and the matching loss read texts with masked words."""
    focal_gamma: float = 2.0
    """Exponent of the focal contrastive loss in pretraining; 0 is the plain one; open."""
    jitter: float = 0.4
    """Greatest change of an image's brightness and contrast while pretraining; open."""
    grayscale_rate: float = 0.2
    """Share of the images that lose their colours while pretraining; open."""
    blur_rate: float = 0.5
    """Share of the images that are blurred while pretraining; open."""
    loss_weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LOSSES, 1))
    """Weights of "vtc", "vtm", "mlm" and "soft", the matching loss of masked images; a weight of 0
    skips that pass, one left out is 1; open."""

    @property
    def masks_by_words(self) -> bool:
        """Whether masks are where the model finds a word."""
        return self.mask_source in ("gradcam", "cross_attention")

    def check(self) -> None:
        """Raise a ValueError that names the first field whose value cannot be."""
        super().check()
        self._check_one_of("mask_source", ("gradcam", "cross_attention", "random", "none"))
        self._check_one_of("mask_normalization", ("max", "minmax"))
        self._check_one_of("mask_compensation", ("add", "multiply", "none"))
        for name in ("mask_keeps", "masks_words_too", "reads_masked_text"):
            self._check_one_of(name, (True, False))
        self._check_numbers(NOT_NEGATIVE, "focal_gamma")
        share = ("a number from 0 to 1", lambda x: 0 <= x <= 1)
        self._check_numbers(share, "mask_mass", "jitter", "grayscale_rate", "blur_rate")
        # In the last layer the match logit depends on [CLS] alone: words have no gradient.
        first, last = self.fusion_layer, self.text_num_hidden_layers - 1
        if self.masks_by_words and self.mask_layer not in range(first, last):
            wanted = f"a fusion layer before the last, {first} to {last - 1}"
            self._refuse("mask_layer", wanted, self.mask_layer)

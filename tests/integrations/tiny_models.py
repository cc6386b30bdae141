"""A tiny model of random weights for each architecture, and attention in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
}
IMAGE = {**SIZES, "image_size": 24, "patch_size": 4}
PIXELS = (2, 3, 24, 24)
VIDEO = (2, 4, 3, 12, 12)

VISION: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "vit": ("ViT", IMAGE, PIXELS),
    "deit": ("DeiT", IMAGE, PIXELS),
    "dinov2": ("Dinov2", IMAGE | {"mlp_ratio": 2}, PIXELS),
    "dinov2_with_registers": ("Dinov2WithRegisters", IMAGE | {"num_register_tokens": 3}, PIXELS),
    "dinov3": ("DINOv3ViT", IMAGE | {"num_register_tokens": 2}, PIXELS),
    "clip": ("CLIPVision", IMAGE, PIXELS),
    "siglip": ("SiglipVision", IMAGE, PIXELS),
    "videomae": (
        "VideoMAE",
        SIZES | {"image_size": 12, "patch_size": 4, "num_frames": 4, "tubelet_size": 1},
        VIDEO,
    ),
    "vivit": (
        "Vivit",
        SIZES | {"image_size": 12, "num_frames": 4, "tubelet_size": [1, 4, 4]},
        VIDEO,
    ),
    "beit": ("Beit", IMAGE | {"use_relative_position_bias": True}, PIXELS),
    "beit_shared": ("Beit", IMAGE | {"use_shared_relative_position_bias": True}, PIXELS),
}
TEXT = SIZES | {"vocab_size": 50, "max_position_embeddings": 20}
TEXTS = {"bert": "Bert", "roberta": "Roberta", "electra": "Electra", "siglip_text": "SiglipText"}
WITH_CLS_FIRST = ("vit", "deit", "dinov2", "dinov2_with_registers", "vivit", "beit", "beit_shared")
TAKES_MASKS = [
    name
    for name in WITH_CLS_FIRST
    if "attention_mask"
    in signature(getattr(transformers, f"{VISION[name][0]}Model").forward).parameters
]
"""Vision models whose forward has an attention_mask; which ones, depends on transformers."""


def build(name: str, implementation: str = "eager", **changes: Any) -> PreTrainedModel:
    """The model in eval mode; the same weights each time, none of them 0."""
    kind, given, _ = VISION[name] if name in VISION else (TEXTS[name], TEXT, ())
    config = getattr(transformers, f"{kind}Config")(**{**given, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")._from_config(
        config, attn_implementation=implementation
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def inputs(name: str, *, masked: bool = False) -> dict[str, Tensor]:
    """A batch for a model; with a mask, holes among its tokens and padding at the end."""
    generator = torch.Generator().manual_seed(1)
    if name in TEXTS:
        found = {"input_ids": torch.randint(3, 50, (2, 12), generator=generator)}
        tokens = 12
    else:
        shape = VISION[name][2]
        found = {"pixel_values": torch.randn(shape, generator=generator)}
        tokens = 37 + (name == "deit") + 3 * (name == "dinov2_with_registers")
    if masked:
        mask = torch.ones(2, tokens, dtype=torch.int64)
        mask[0, tokens - 4 :] = 0
        mask[1, 3:6] = 0
        found["attention_mask"] = mask
    return found


def run(model: nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """States of a model's last layer, and the gradients of a loss by its parameters."""
    model.zero_grad()
    states = model(**given).last_hidden_state
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(2))
    (states * weights).sum().backward()
    found = [
        p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in model.parameters()
    ]
    return states.detach(), found


def assert_equal_runs(
    actual: tuple[Tensor, list[Tensor]], wanted: tuple[Tensor, list[Tensor]]
) -> None:
    """Forward to 1e-5 and gradients to 1e-4, relative to the largest element."""
    torch.testing.assert_close(actual[0], wanted[0], rtol=1e-5, atol=1e-5)
    for a, b in zip(actual[1], wanted[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * max(1.0, float(b.abs().max())))


Record = Callable[[nn.Module, Tensor], None]


@contextmanager
def eager_with(
    masks: Callable[[nn.Module], Tensor | None], record: Record | None = None
) -> Iterator[str]:
    """An attention implementation in eager PyTorch, under more masks: of a module, True attends."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        scaling: float | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if attention_mask is not None:
            scores = scores + attention_mask
        more = masks(module)
        if more is not None:
            scores = scores.masked_fill(~more, float("-inf"))
        weights = scores.softmax(-1)
        if record is not None:
            record(module, weights.detach())
        return (weights @ value).transpose(1, 2), None

    AttentionInterface.register("masked_eager", attention)
    AttentionMaskInterface.register("masked_eager", eager_mask)
    yield "masked_eager"

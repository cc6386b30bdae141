"""Models of Hugging Face: attention by SDPA, by the dense plug-in, and made sparse.

Forward is the encoder in evaluation, forward and backward also the gradient of its pixels. The
fact `mac_ratio` is the sparse model's share of the dense one's multiplications: its inverse is the
speed-up that they promise.

The gate: states and gradients agree with the same weights in fp64 by SDPA, that of the sparse model
under the masks of its layouts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    PreTrainedModel,
    VideoMAEConfig,
    VideoMAEModel,
    ViTConfig,
    ViTModel,
)

import svitt_ops as so
from bench.measure import results
from bench.measure.harness import DTYPES, Case, Expected, Problem, Provider
from svitt_ops.integrations.transformers import layouts, sparsify

PEAKED = {"initializer_range": 0.1}
"""Of weights whose attention tells keys apart: a wrong layout must not pass the gate."""
MODELS: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "videomae_base": (VideoMAEModel, VideoMAEConfig, {"num_frames": 16, **PEAKED}),
    "vit_base_384": (ViTModel, ViTConfig, {"image_size": 384, **PEAKED}),
}
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 64,
    "patch_size": 8,
    "initializer_range": 0.4,
}
ORACLE = "sdpa_of_layouts"


def cases(device: str) -> list[Case]:
    """VideoMAE-B on 16 frames and ViT-B/16 at 384 x 384; a tiny one to try."""
    return list(_cases(device))


def _cases(device: str) -> Iterator[Case]:
    batch = 8 if device == "cuda" else 1

    def case(model: str, dtype: str, size: str = "base", **given: bool) -> Case:
        fields = {"model": model, "size": size, "batch": batch, "block_size": 56, "num_random": 3}
        name = f"{model if size == 'base' else size}-{dtype}"
        return Case(name=name, dtype=dtype, device=device, fields=fields, **given)

    yield shrunk(case("videomae_base", "fp32", "tiny", quick=True, named=True))
    for model in MODELS:
        for dtype in ("bf16",) if device == "cuda" else ("fp32", "bf16"):
            yield case(model, dtype)


def shrunk(case: Case) -> Case:
    """The same with a tiny model."""
    return case.shrunk(size="tiny", block_size=8, num_random=1, batch=1)


def problem(case: Case) -> Problem:
    """The model, made anew for each provider from one seed."""
    trial = Trial(case)
    pixels = trial.pixels
    shape = (pixels.shape[0], trial.tokens, trial.config.hidden_size)
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(pixels)
    dense_edges = trial.tokens**2
    edges = sum(x.num_edges for x in trial.layouts) / len(trial.layouts)
    linear, sparse = trial.linear_flops, trial.attention_flops(edges)
    dense = trial.attention_flops(dense_edges)
    weights = sum(x.numel() for x in trial.model("sdpa").parameters()) * pixels.element_size()
    return Problem(
        inputs={"pixel_values": pixels},
        upstream=upstream,
        outputs=("states",),
        oracles={"op": partial(trial.expected, True), "dense": partial(trial.expected, False)},
        providers=[
            Provider(
                name="svitt_ops", role="ours", build=partial(trial.build, "svitt_ops", True),
                note="made sparse in place",
            ),
            Provider(
                name="plug_in", role="variant", oracle="dense",
                build=partial(trial.build, "svitt_ops"), note="dense attention by svitt_ops",
            ),
            Provider(name="sdpa", oracle="dense", build=partial(trial.build, "sdpa")),
        ],
        flops={
            "forward": linear + sparse,
            # No gradient of weights: a product back for each of the linear ones.
            "forward_backward": 2 * linear + 3.5 * sparse,
        },
        bytes={"forward": float(weights), "forward_backward": 2.0 * weights},
        facts={
            "tokens": trial.tokens,
            "edge_ratio": dense_edges / edges,
            "mac_ratio": (linear + sparse) / (linear + dense),
        },
    )  # fmt: skip


class Trial:
    """A case's model, as every provider and the oracle have it."""

    def __init__(self, case: Case) -> None:
        self.case, self.device = case, torch.device(case.device)
        self.kind, config, given = MODELS[case.fields["model"]]
        self.config = config(**given | (TINY if case.fields["size"] == "tiny" else {}))

    def model(self, implementation: str) -> PreTrainedModel:
        """In evaluation and fp32; the same weights each time."""
        torch.manual_seed(0)
        made: PreTrainedModel = self.kind._from_config(
            copy.deepcopy(self.config), attn_implementation=implementation
        )
        return made.eval().to(self.device)

    def build(self, implementation: str, sparse: bool = False) -> Callable[..., tuple[Tensor]]:
        model = self.model(implementation).to(DTYPES[self.case.dtype])
        if sparse:
            self.sparsified(model)
        return lambda pixels: (model(pixels).last_hidden_state,)

    def sparsified(self, model: PreTrainedModel) -> PreTrainedModel:
        names = ("block_size", "num_random")
        return sparsify(model, **{name: self.case.fields[name] for name in names})

    @cached_property
    def pixels(self) -> Tensor:
        size = self.config.image_size
        frames = (self.config.num_frames,) if hasattr(self.config, "num_frames") else ()
        shape = (self.case.fields["batch"], *frames, 3, size, size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        return noise.to(self.device, DTYPES[self.case.dtype])

    @cached_property
    def layouts(self) -> list[so.BlockLayout]:
        """Of the sparse model: in evaluation always the same."""
        model = self.sparsified(self.model("svitt_ops"))
        with torch.no_grad():
            model(self.pixels.float())
        return layouts(model)

    @property
    def tokens(self) -> int:
        return self.layouts[0].seq_len

    @property
    def linear_flops(self) -> float:
        """Of projections, feed-forward layers and the embedding of patches."""
        config, batch = self.config, self.case.fields["batch"]
        dim, hidden = config.hidden_size, config.intermediate_size
        patch = 3 * config.patch_size**2 * getattr(config, "tubelet_size", 1)
        layer = 4 * dim**2 + 2 * dim * hidden
        macs = batch * self.tokens * (config.num_hidden_layers * layer + dim * patch)
        return 2.0 * macs

    def attention_flops(self, edges: float) -> float:
        """Of all layers, with so many pairs of tokens in each."""
        config, batch = self.config, self.case.fields["batch"]
        return 4.0 * batch * config.num_hidden_layers * config.hidden_size * edges

    def expected(self, sparse: bool) -> Expected:
        return Expected.of(partial(self._reference, sparse), DTYPES[self.case.dtype])

    def _reference(self, sparse: bool, dtype: torch.dtype) -> dict[str, Tensor]:
        """States and the gradient of the pixels by SDPA, every step in a dtype."""
        model = self.model("sdpa").to(dtype)
        calls = [x for x in model.modules() if hasattr(x, "is_causal")]
        masks = [x.to_dense() for x in self.layouts] if sparse else [None] * len(calls)
        by_module = dict(zip(calls, masks, strict=True))

        def attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, None]:
            sdpa = F.scaled_dot_product_attention
            out = checkpoint(sdpa, query, key, value, by_module[module], use_reentrant=False)
            return out.transpose(1, 2), None

        AttentionInterface.register(ORACLE, attention)
        model.set_attn_implementation(ORACLE)
        pixels = self.pixels.to(dtype).requires_grad_()
        states = model(pixels).last_hidden_state
        generator = torch.Generator().manual_seed(2)
        upstream = torch.randn(states.shape, generator=generator).to(self.pixels).to(dtype)
        (grad,) = torch.autograd.grad(states, pixels, upstream)
        return {"states": states.detach(), "grad_pixel_values": grad}


def summary(result: dict[str, Any]) -> str:
    """A line below the live table's rows: the speed-up beside that which the MACs promise."""
    mine, dense = results.timed(result, "svitt_ops"), results.timed(result, "sdpa")
    if mine is None or dense is None:
        return ""
    gained, promised = dense["ms"] / mine["ms"], 1 / result["facts"]["mac_ratio"]
    return f"{'':<22} {gained:.2f} times as fast as sdpa; MACs promise {promised:.2f}"

"""A training step of SViTT-B: forward, losses, backward, optimizer; dense against sparse.

Its peak memory is gradients and activations; the weights and the optimizer's state, alike for all,
are the fact `state_bytes`.

The gate: losses stay finite, and what `svitt_ops` computes with nothing dropped (every block
listed, keep rates 1) equals dense attention by SDPA on the same weights, losses and embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bench.measure.harness import Case, Problem, Provider
from bench.measure.training_step import (
    PROOF,
    PROOF_BATCH,
    STATE_BYTES,
    STEP_BYTES,
    Step,
    Trial,
    texts,
)
from bench.peers.dense_attention import DenseSelfAttention
from bench.report.step import summary
from svitt_ops.models import SViTTConfig, SViTTForPreTraining
from svitt_ops.models.svitt.sparsity import CURRICULUM, TEXT_LENGTH, video_macs

__all__ = ["cases", "problem", "shrunk", "summary"]

LOSSES = ("loss", "loss_vtc", "loss_vtm", "loss_mlm")
TINY = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "block_size": 8,
    "prune_layers": [1],
    "vocab_size": 101,
    "text_hidden_size": 64,
    "text_num_hidden_layers": 3,
    "fusion_layer": 1,
    "text_num_attention_heads": 2,
    "text_intermediate_size": 128,
    "projection_dim": 32,
}


def cases(device: str) -> list[Case]:
    """The whole step and the video tower's alone, at each stage of the paper's curriculum."""
    found = [_case("tiny", "step", 4, 2, "fp32", device, quick=True, named=True)]
    dtypes = ("bf16",) if device == "cuda" else ("fp32", "bf16")
    for part in ("step", "tower"):
        for dtype in dtypes:
            for frames in CURRICULUM:
                batch = 32 if device == "cuda" else 2 if frames < 16 else 1
                # Minutes a step on a CPU.
                named = device == "cpu" and frames == 16
                found.append(_case("base", part, frames, batch, dtype, device, named=named))
    return found


def _case(
    size: str, part: str, frames: int, batch: int, dtype: str, device: str, **given: bool
) -> Case:
    fields = {"size": size, "part": part, "frames": frames, "batch": batch}
    fields |= {"keep_rate": CURRICULUM[frames], "text_length": TEXT_LENGTH}
    name = f"{part if size == 'base' else size}-t{frames}-b{batch}-{dtype}"
    return Case(name=name, dtype=dtype, device=device, fields=fields, directions=("step",), **given)


def shrunk(case: Case) -> Case:
    """The same with a tiny model."""
    return case.shrunk(size="tiny", batch=2)


def problem(case: Case) -> Problem:
    """The model, made when the first provider needs it, and everyone who trains it."""
    trial = Clips(case)
    config, batch = trial.config, case.fields["batch"]
    macs, dense_macs = video_macs(config), video_macs(config, dense=True)
    patches = config.num_patches
    return Problem(
        inputs={},
        upstream=torch.empty(0),
        outputs=("losses", PROOF),
        oracles={"op": trial.expected},
        providers=list(_providers(trial)),
        flops={"step": 6.0 * batch * macs},
        bytes={"step": STEP_BYTES * trial.num_weights},
        facts={
            "tokens": batch * (patches + 1 + case.fields["text_length"] * (trial.part == "step")),
            "patches": patches,
            "mac_ratio": macs / dense_macs,
            "weights": trial.num_weights,
            "state_bytes": STATE_BYTES * trial.num_weights,
        },
    )


def _providers(trial: Clips) -> Iterator[Provider]:
    kept = {"keep_rate": 1.0, "multimodal_keep_rate": 1.0}
    everything = {"edge_sparsity": False, **kept}
    for name, role, note, change, attention in (
        ("hybrid", "ours", "edges and nodes dropped", {}, "op"),
        ("edge", "variant", "edges dropped", kept, "op"),
        ("node", "variant", "nodes dropped", {"edge_sparsity": False}, "op"),
        ("dense", "variant", "nothing dropped, attention by svitt_ops", everything, "op"),
        ("dense_sdpa", "peer", "dense: SDPA with the relative position bias", everything, "sdpa"),
        ("dense_plain", "peer", "dense: SDPA without the bias", everything, "plain"),
    ):
        yield Provider(
            name=name,
            role=role,  # type: ignore[arg-type]
            build=lambda how=(change, attention): Step(trial, how),  # type: ignore[misc]
            note=note,
            same=role == "ours",
        )
    # Last: making them takes a step, and the weights that others are proved on must not have moved.
    for name, change in (("hybrid", {}), ("dense", everything)) if trial.part == "step" else ():
        yield Provider(
            name=f"{name}_compiled",
            role="variant",
            build=lambda how=(change, "op"): Step(trial, how, compiled=True),  # type: ignore[misc]
            note=f"{name}, its forward and its backward compiled",
            compiled=True,
            quick=False,
            same=False,
        )


class Clips(Trial):
    """SViTT and a batch of clips; a provider is a change of the configuration, and an attention."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        fields = case.fields
        self.part, self.text_length = fields["part"], fields["text_length"]
        # Tables of noise: of zeros, dense attention with and without them would be alike.
        given: dict[str, Any] = {"num_frames": fields["frames"], "keep_rate": fields["keep_rate"]}
        given |= {"bias_init_std": 0.5, **(TINY if fields["size"] == "tiny" else {})}
        self.config = SViTTConfig(**given)
        self._undropped: dict[tuple[bool, str], Tensor] = {}

    def build(self) -> nn.Module:
        return SViTTForPreTraining(self.config)

    def trained(self, model: Any) -> nn.Module:
        found: nn.Module = model.video if self.part == "tower" else model
        return found

    @cached_property
    def own_attention(self) -> list[nn.Module]:
        """The attention of each layer of the video tower, as the model has it."""
        return [layer.attention for layer in self.model.video.layers]

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """A batch of noise for clips, and of random pieces for texts."""
        config, size = self.config, self.config.image_size
        generator = torch.Generator().manual_seed(1)
        clips = (self.batch, config.num_frames, 3, size, size)
        found = {"pixel_values": torch.rand(clips, generator=generator) * 2 - 1}
        if self.part == "step":
            found |= texts(self.batch, self.text_length, config.vocab_size, generator)
        return {name: value.to(self.device) for name, value in found.items()}

    @contextmanager
    def as_set(self, how: tuple[dict[str, Any], str]) -> Iterator[None]:
        """The model with other values in its config, and maybe other attention."""
        change, attention = how
        config, layers = self.model.config, self.model.video.layers
        before = {name: getattr(config, name) for name in change}
        own = self.own_attention
        used = own
        if attention != "op":
            used = [DenseSelfAttention(x, with_bias=attention == "sdpa") for x in own]
        try:
            for name, value in change.items():
                setattr(config, name, value)
            for layer, module in zip(layers, used, strict=True):
                layer.attention = module
            yield
        finally:
            for name, value in before.items():
                setattr(config, name, value)
            for layer, module in zip(layers, own, strict=True):
                layer.attention = module

    def losses(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        if self.part == "tower":
            tokens = self.model.video(inputs["pixel_values"]).tokens
            return tokens.float().square().mean()[None], tokens[:, 0]
        found = self.model(**inputs)
        return torch.stack([getattr(found, name) for name in LOSSES]), found.video_embeds

    def proof(self, how: tuple[dict[str, Any], str]) -> Tensor:
        change, attention = how
        sparse = change.get("edge_sparsity", self.config.edge_sparsity)
        # SDPA is what others are compared with; without the bias it is another function.
        return self.undropped(sparse, "op" if attention == "op" else "sdpa")

    @property
    def peer_proof(self) -> Tensor:
        return self.undropped(False, "sdpa")

    def undropped(self, edge_sparsity: bool, attention: str) -> Tensor:
        """Losses and embeddings of a few pairs with nothing dropped.

        With edge sparsity every block is listed for every block: the sparse path, a full layout.
        """
        key = (edge_sparsity, attention)
        if key not in self._undropped:
            change = {"edge_sparsity": edge_sparsity, "num_random": 10**6}
            change |= {"keep_rate": 1.0, "multimodal_keep_rate": 1.0}
            few = {name: x[:PROOF_BATCH] for name, x in self.inputs.items()}
            self._undropped[key] = self.evaluated((change, attention), few)
        return self._undropped[key]

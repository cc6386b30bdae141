"""A training step of SViTT-B: forward, losses, backward, optimizer; dense against sparse.

All providers train one model: the weights, the batch and the optimizer are the same, and what
differs is set before each call. Its peak memory is gradients and activations; the weights and the
optimizer's state, alike for all, are the fact `state_bytes`.

The gate: losses stay finite, and what `svitt_ops` computes with nothing dropped (every block
listed, keep rates 1) equals dense attention by SDPA on the same weights, losses and embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from bench.measure.harness import Case, Expected, Problem, Provider
from bench.peers.dense_attention import DenseSelfAttention
from bench.report.step import summary
from svitt_ops.models import SViTTConfig, SViTTForPreTraining
from svitt_ops.models.svitt.sparsity import CURRICULUM, TEXT_LENGTH, video_macs

__all__ = ["cases", "problem", "shrunk", "summary"]

STEP_BYTES = 40.0
"""Bytes per weight: read by both passes, its gradient written, AdamW reads four and writes three
numbers of four bytes."""
PROOF_TOLERANCE = 1e-4
"""How far fp32 losses and embeddings may be from those of SDPA: rounding, amplified by 1 / 0.07."""
PROOF_BATCH = 2
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
    trial = Trial(case)
    config, batch = trial.config, case.fields["batch"]
    macs, dense_macs = video_macs(config), video_macs(config, dense=True)
    patches = config.num_patches
    return Problem(
        inputs={},
        upstream=torch.empty(0),
        outputs=("losses", "undropped"),
        oracles={"op": trial.expected},
        providers=list(_providers(trial)),
        flops={"step": 6.0 * batch * macs},
        bytes={"step": STEP_BYTES * trial.num_weights},
        facts={
            "tokens": batch * (patches + 1 + case.fields["text_length"] * (trial.part == "step")),
            "patches": patches,
            "mac_ratio": macs / dense_macs,
            "weights": trial.num_weights,
            "state_bytes": 12 * trial.num_weights,
        },
    )


def _providers(trial: Trial) -> Iterator[Provider]:
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
            build=lambda change=change, attention=attention: Step(  # type: ignore[misc]
                trial, change, attention
            ),
            note=note,
            same=role == "ours",
        )


class Trial:
    """A case's model, batch and optimizer, made once, and the proofs of what it computes."""

    def __init__(self, case: Case) -> None:
        fields, self.device = case.fields, torch.device(case.device)
        self.part, self.batch, self.dtype = fields["part"], fields["batch"], case.dtype
        self.text_length = fields["text_length"]
        # Tables of noise: of zeros, dense attention with and without them would be alike.
        given: dict[str, Any] = {"num_frames": fields["frames"], "keep_rate": fields["keep_rate"]}
        given |= {"bias_init_std": 0.5, **(TINY if fields["size"] == "tiny" else {})}
        self.config = SViTTConfig(**given)
        self._undropped: dict[tuple[bool, str], Tensor] = {}

    @cached_property
    def num_weights(self) -> int:
        """Parameters that the step trains."""
        with torch.device("meta"):
            model = SViTTForPreTraining(self.config)
        return sum(x.numel() for x in _trained(model, self.part).parameters())

    @cached_property
    def model(self) -> SViTTForPreTraining:
        """The model that all providers train."""
        torch.manual_seed(0)
        return SViTTForPreTraining(self.config).to(self.device).train()

    @cached_property
    def own_attention(self) -> list[nn.Module]:
        """The attention of each layer of the video tower, as the model has it."""
        return [layer.attention for layer in self.model.video.layers]

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW, fused as in `svitt pretrain`, at a rate that hardly moves the weights.

        Its state is there from the start: the first step is one whose memory is read.
        """
        weights = list(_trained(self.model, self.part).parameters())
        made = torch.optim.AdamW(weights, lr=1e-6, weight_decay=0.02, fused=True)
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        made.step()
        made.zero_grad()
        return made

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """A batch of noise for clips, and of random pieces for texts."""
        config, size, generator = self.config, self.config.image_size, torch.Generator()
        generator.manual_seed(1)
        clips = (self.batch, config.num_frames, 3, size, size)
        texts = (self.batch, self.text_length)
        pieces = torch.randint(1, config.vocab_size, texts, generator=generator)
        masked = torch.rand(texts, generator=generator) < 0.5
        masked[:, 0] = True
        found = {"pixel_values": torch.rand(clips, generator=generator) * 2 - 1}
        if self.part == "step":
            found["input_ids"] = pieces
            found["attention_mask"] = torch.ones_like(pieces)
            found["pair_ids"] = torch.arange(self.batch)
            found["mlm_input_ids"] = pieces.masked_fill(masked, 1)
            found["mlm_labels"] = pieces.masked_fill(~masked, -100)
        return {name: value.to(self.device) for name, value in found.items()}

    @contextmanager
    def as_set(self, change: dict[str, Any], attention: str) -> Iterator[None]:
        """The model with other values in its config, and maybe other attention."""
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

    def losses(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The losses of a batch, the one to minimise first, and the embeddings of its clips."""
        if self.part == "tower":
            tokens = self.model.video(inputs["pixel_values"]).tokens
            return tokens.float().square().mean()[None], tokens[:, 0]
        found = self.model(**inputs)
        return torch.stack([getattr(found, name) for name in LOSSES]), found.video_embeds

    def undropped(self, edge_sparsity: bool, attention: str) -> Tensor:
        """Losses and embeddings of a few pairs in fp32, evaluated with nothing dropped.

        With edge sparsity every block is listed for every block: the sparse path, a full layout.
        """
        key = (edge_sparsity, attention)
        if key not in self._undropped:
            change = {"edge_sparsity": edge_sparsity, "num_random": 10**6}
            change |= {"keep_rate": 1.0, "multimodal_keep_rate": 1.0}
            few = {name: x[:PROOF_BATCH] for name, x in self.inputs.items()}
            with self.as_set(change, attention), torch.no_grad():
                self.model.eval()
                torch.manual_seed(0)  # of the pairs that do not match
                losses, embeds = self.losses(few)
                self.model.train()
            self._undropped[key] = torch.cat([losses, embeds.flatten()])
        return self._undropped[key]

    def expected(self) -> Expected:
        """Finite losses, and no distance from dense attention by SDPA where nothing is dropped."""
        dense = self.undropped(False, "sdpa")
        count = 1 if self.part == "tower" else len(LOSSES)

        def seen(found: Any) -> dict[str, Tensor]:
            finite = found["losses"].isfinite().double()
            return {"finite_losses": finite, "undropped": found["undropped"].double() - dense}

        return Expected(
            values={
                "finite_losses": torch.ones(count, device=self.device).double(),
                "undropped": torch.zeros_like(dense).double(),
            },
            plain_error={"finite_losses": 0.0, "undropped": PROOF_TOLERANCE / 2},
            seen=seen,
        )


@dataclass
class Step:
    """One step of training with some things dropped; its FLOP are counted at the first call."""

    trial: Trial
    change: dict[str, Any]
    attention: str
    flops: float = 0.0

    def __post_init__(self) -> None:
        sparse = self.change.get("edge_sparsity", self.trial.config.edge_sparsity)
        # SDPA is what others are compared with; without the bias it is another function.
        attention = "op" if self.attention == "op" else "sdpa"
        self.proof = self.trial.undropped(sparse, attention)
        self.trial.optimizer.zero_grad()  # makes it, before a step is measured

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Train; the losses of this step, and what the proof found."""
        if self.flops:
            return self._step(), self.proof
        with FlopCounterMode(display=False, custom_mapping=_CPU_FORMULAS) as counter:
            losses = self._step()
        self.flops = float(counter.get_total_flops())
        return losses, self.proof

    def _step(self) -> Tensor:
        trial = self.trial
        low = trial.dtype != "fp32"
        with trial.as_set(self.change, self.attention):
            with torch.autocast(trial.device.type, torch.bfloat16, enabled=low):
                losses, _ = trial.losses(trial.inputs)
            losses[0].backward()
            trial.optimizer.step()
            trial.optimizer.zero_grad()
        return losses.detach()


def _trained(model: SViTTForPreTraining, part: str) -> nn.Module:
    return model.video if part == "tower" else model


def _flash_on_cpu(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _flash_on_cpu_backward(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


_CPU_FORMULAS: dict[Any, Callable[..., int]] = {
    # torch counts those of GPUs.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash_on_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_on_cpu_backward,
}

"""A training step of ALBEF and of SIMLA: all losses, the momentum twin and its queues.

Forward of the model and of its twin, losses, backward, optimizer, the twin's update. Peak memory is
gradients and activations; the fact `state_bytes` is what stays: the weights, the optimizer's state,
the twin and the queues.

The gate: losses stay finite, and what each provider computes of two pairs, whose negatives are each
other, equals what SDPA and eager losses do on the same weights: losses and embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property

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
from bench.peers.dense_attention import attending_by_sdpa
from bench.peers.eager_losses import losing_eagerly
from bench.report.step import summary
from svitt_ops.models import ALBEFConfig, ALBEFForPreTraining, SIMLAConfig, SIMLAForPreTraining
from svitt_ops.models.svitt.sparsity import video_macs

__all__ = ["cases", "problem", "shrunk", "summary"]

TEXT_LENGTH = 25
PEER = "sdpa_eager"
PROVIDERS = {
    "svitt_ops": ("ours", frozenset(), "attention and losses by svitt_ops"),
    "eager_losses": ("variant", frozenset({"losses"}), "attention by svitt_ops, losses by torch"),
    "sdpa": ("variant", frozenset({"attention"}), "attention by SDPA, losses by svitt_ops"),
    PEER: ("peer", frozenset({"attention", "losses"}), "attention by SDPA, losses by torch"),
}
"""Roles, what torch computes, and notes."""
SYSTEMS = {
    "albef": (ALBEFConfig, ALBEFForPreTraining, {}),
    "simla": (SIMLAConfig, SIMLAForPreTraining, {"fusion_layer": 0, "image_vocab_size": 64}),
}
"""Configurations, models, and what a tiny one has besides."""
TINY = {
    "image_size": 64,
    "patch_size": 8,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 101,
    "text_hidden_size": 64,
    "text_num_hidden_layers": 3,
    "fusion_layer": 1,
    "text_num_attention_heads": 2,
    "text_intermediate_size": 128,
    "max_position_embeddings": 66,
    "projection_dim": 32,
    "queue_size": 512,
    "unpaired_layers": 1,
    "masked_patches": 20,
    "initializer_range": 0.1,  # of less, attention hardly counts, and its faults would pass
}


def cases(device: str) -> list[Case]:
    """A step of each system's base model, and of a tiny one."""
    found = [_case(system, "tiny", 4, "fp32", device, quick=True, named=True) for system in SYSTEMS]
    dtypes = ("bf16",) if device == "cuda" else ("fp32", "bf16")
    batch = 32 if device == "cuda" else 2
    found += [_case(system, "base", batch, dtype, device) for system in SYSTEMS for dtype in dtypes]
    return found


def _case(system: str, size: str, batch: int, dtype: str, device: str, **given: bool) -> Case:
    fields = {"system": system, "size": size, "batch": batch, "text_length": TEXT_LENGTH}
    name = f"{system}{'' if size == 'base' else f'-{size}'}-b{batch}-{dtype}"
    return Case(name=name, dtype=dtype, device=device, fields=fields, directions=("step",), **given)


def shrunk(case: Case) -> Case:
    """The same with a tiny model."""
    return case.shrunk(size="tiny", batch=2)


def problem(case: Case) -> Problem:
    """The model, made when the first provider needs it, and everyone who trains it."""
    trial = Pairs(case)
    config, batch = trial.config, case.fields["batch"]
    # Of image towers alone, the twin's too; where patches are masked, images pass a second time.
    passes = 2 if "mim" in config.losses else 1
    return Problem(
        inputs={},
        upstream=torch.empty(0),
        outputs=("losses", PROOF),
        oracles={"op": trial.expected},
        providers=[
            Provider(
                name=name,
                role=role,  # type: ignore[arg-type]
                build=lambda how=how: Step(trial, how),  # type: ignore[misc]
                note=note,
                same=True,
            )
            for name, (role, how, note) in PROVIDERS.items()
        ],
        flops={"step": 8.0 * passes * batch * video_macs(config)},
        bytes={"step": STEP_BYTES * trial.num_weights},
        facts={
            "tokens": batch * (config.num_patches + 1 + case.fields["text_length"]),
            "patches": config.num_patches,
            "queue": config.queue_size,
            "weights": trial.num_weights,
            "state_bytes": STATE_BYTES * trial.num_weights + trial.kept_bytes,
        },
    )


class Pairs(Trial):
    """A system and a batch of pairs; a provider is the set of what torch computes."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        config, self.model_class, own = SYSTEMS[case.fields["system"]]
        tiny = case.fields["size"] == "tiny"
        self.config = config(**({**TINY, **own} if tiny else {}))
        self.names = ("loss", *(f"loss_{name}" for name in self.config.losses))
        self._proofs: dict[frozenset[str], Tensor] = {}

    def build(self) -> nn.Module:
        found: nn.Module = self.model_class(self.config)
        return found

    @cached_property
    def kept_bytes(self) -> int:
        """Of what no optimizer has: the twin, the queues, the tokenizer of patches."""
        with torch.device("meta"):
            model = self.build()
        kept = [*model.buffers(), *(x for x in model.parameters() if not x.requires_grad)]
        return sum(x.numel() * x.element_size() for x in kept)

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """A batch of noise for pictures, and of random pieces for texts."""
        config, size = self.config, self.config.image_size
        generator = torch.Generator().manual_seed(1)
        found = texts(self.batch, self.case.fields["text_length"], config.vocab_size, generator)
        found["pixel_values"] = torch.rand(self.batch, 3, size, size, generator=generator) * 2 - 1
        return {name: value.to(self.device) for name, value in found.items()}

    @contextmanager
    def as_set(self, how: frozenset[str]) -> Iterator[None]:
        with ExitStack() as stack:
            if "attention" in how:
                stack.enter_context(attending_by_sdpa())
            if "losses" in how:
                stack.enter_context(losing_eagerly())
            yield

    def losses(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        found = self.model(**inputs)
        return torch.stack([found[name] for name in self.names]), found.video_embeds

    def proof(self, how: frozenset[str]) -> Tensor:
        if how not in self._proofs:
            few = {name: x[:PROOF_BATCH] for name, x in self.inputs.items()}
            if "mim" in self.config.losses:  # drawn after the negatives, by which providers differ
                masked = torch.arange(self.config.num_patches, device=self.device) % 3 == 0
                few["masked_patches"] = masked.expand(PROOF_BATCH, -1)
            self._proofs[how] = self.evaluated(how, few)
        return self._proofs[how]

    @property
    def peer_proof(self) -> Tensor:
        return self.proof(PROVIDERS[PEER][1])

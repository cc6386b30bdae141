"""What the cases of training steps share: one model, its optimizer, and a step that counts FLOP.

All providers of a case train one model: the weights, the batch and the optimizer are the same, and
what differs is set before each call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from bench.measure.harness import Case, Expected
from svitt_ops.training.engine.process import compile_backward_outside_autocast

STEP_BYTES = 40.0
"""Bytes per weight: read by both passes, its gradient written, AdamW reads four and writes three
numbers of four bytes."""
STATE_BYTES = 12
"""Bytes per weight: it, and AdamW's two moments."""
PROOF_TOLERANCE = 1e-4
"""How far fp32 losses and embeddings may be from those of SDPA: rounding, amplified by 1 / 0.07."""
COMPILED_TOLERANCE = 0.05
"""How far losses of a compiled step may be from those of the step in bf16: it rounds less often."""
PROOF_BATCH = 2
PROOF = "proof"


class Trial:
    """A case's model, batch and optimizer, made once, and the proofs of what it computes."""

    def __init__(self, case: Case) -> None:
        self.case, self.device = case, torch.device(case.device)
        self.batch, self.dtype = case.fields["batch"], case.dtype
        compile_backward_outside_autocast()  # as `svitt pretrain` does

    def build(self) -> nn.Module:
        """The model, whose weights are drawn from the seed that is set."""
        raise NotImplementedError

    def trained(self, model: nn.Module) -> nn.Module:
        """The part of the model that the step trains."""
        return model

    def as_set(self, how: Any) -> AbstractContextManager[None]:
        """The model as a provider has it."""
        raise NotImplementedError

    def losses(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The losses of a batch, the one to minimise first, and the embeddings of its pictures."""
        raise NotImplementedError

    def proof(self, how: Any) -> Tensor:
        """What a provider computes of a few pairs, to be compared with `peer_proof`."""
        raise NotImplementedError

    @property
    def peer_proof(self) -> Tensor:
        """What torch computes of them."""
        raise NotImplementedError

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The batch."""
        raise NotImplementedError

    @cached_property
    def num_weights(self) -> int:
        """Parameters that the step trains."""
        with torch.device("meta"):
            return sum(x.numel() for x in self._weights(self.build()))

    @cached_property
    def model(self) -> Any:
        """The model that all providers train."""
        torch.manual_seed(0)
        return self.build().to(self.device).train()

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW, fused as in `svitt pretrain`, at a rate that hardly moves the weights.

        Its state is there from the start: the first step is one whose memory is read.
        """
        weights = self._weights(self.model)
        made = torch.optim.AdamW(weights, lr=1e-6, weight_decay=0.02, fused=True)
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        made.step()
        made.zero_grad()
        return made

    def _weights(self, model: nn.Module) -> list[nn.Parameter]:
        return [x for x in self.trained(model).parameters() if x.requires_grad]

    def evaluated(self, how: Any, few: Mapping[str, Tensor]) -> Tensor:
        """Losses and embeddings of a few pairs in fp32, without dropout, as a provider has them."""
        with self.as_set(how), torch.no_grad():
            self.model.eval()
            torch.manual_seed(0)  # of what is drawn
            losses, embeds = self.losses(few)
            self.model.train()
        return torch.cat([losses, embeds.flatten()])

    def expected(self) -> Expected:
        """Finite losses, and no distance from torch's proof."""
        peer = self.peer_proof

        def seen(found: Any) -> dict[str, Tensor]:
            finite = found["losses"].isfinite().all().double()
            return {"finite_losses": finite, PROOF: found[PROOF].double() - peer}

        return Expected(
            values={
                "finite_losses": torch.ones((), device=self.device).double(),
                PROOF: torch.zeros_like(peer).double(),
            },
            plain_error={"finite_losses": 0.0, PROOF: PROOF_TOLERANCE / 2},
            seen=seen,
        )


@dataclass
class Step:
    """One step of training as a provider has it; its FLOP are counted at the first call.

    A compiled one is compiled when it is made, as one graph, and must have the losses of the same
    step without a compiler, which also counts its FLOP.
    """

    trial: Trial
    how: Any
    flops: float = 0.0
    compiled: bool = False

    def __post_init__(self) -> None:
        self.losses = self.trial.losses
        self.proof = self.trial.proof(self.how)
        self.trial.optimizer.zero_grad()  # makes it, before a step is measured
        if self.compiled:
            self._compile()

    def _compile(self) -> None:
        self.trial.peer_proof  # noqa: B018 (kept: of weights that have not moved yet)
        self()
        wanted = self._drawn()
        self.losses = torch.compile(
            self.trial.losses, fullgraph=True, dynamic=False, options={"fallback_random": True}
        )
        torch.testing.assert_close(self._drawn(), wanted, rtol=COMPILED_TOLERANCE, atol=0)
        self()  # compiles the backward

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Train; the losses of this step, and what the proof found."""
        if self.flops:
            return self._step(), self.proof
        with FlopCounterMode(display=False, custom_mapping=CPU_FORMULAS) as counter:
            losses = self._step()
        self.flops = float(counter.get_total_flops())
        return losses, self.proof

    def _step(self) -> Tensor:
        trial = self.trial
        with trial.as_set(self.how):
            trial.model.before_step()
            losses = self._forward()
            losses[0].backward()
            trial.optimizer.step()
            trial.optimizer.zero_grad()
        return losses.detach()

    def _forward(self) -> Tensor:
        trial = self.trial
        with torch.autocast(trial.device.type, torch.bfloat16, enabled=trial.dtype != "fp32"):
            losses, _ = self.losses(trial.inputs)
        return losses

    def _drawn(self) -> Tensor:
        """Losses of what a seed draws."""
        torch.manual_seed(0)
        with self.trial.as_set(self.how):
            return self._forward().detach()


def texts(
    batch: int, length: int, vocab_size: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """A batch of random pieces, half of them masked."""
    pieces = torch.randint(1, vocab_size, (batch, length), generator=generator)
    masked = torch.rand((batch, length), generator=generator) < 0.5
    masked[:, 0] = True
    return {
        "input_ids": pieces,
        "attention_mask": torch.ones_like(pieces),
        "pair_ids": torch.arange(batch),
        "mlm_input_ids": pieces.masked_fill(masked, 1),
        "mlm_labels": pieces.masked_fill(~masked, -100),
    }


def _flash_on_cpu(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _flash_on_cpu_backward(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


CPU_FORMULAS: dict[Any, Callable[..., int]] = {
    # torch counts those of GPUs.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash_on_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_on_cpu_backward,
}

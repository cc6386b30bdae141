"""What the loss against a queue is compared with: ALBEF's formulation, compiled, and chunked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure.harness import Function, Provider, also_compiled
from bench.peers import library

CHUNK = 4096


@dataclass(frozen=True, kw_only=True)
class Queue:
    """What has no gradient: the momentum encoder's features."""

    key: Tensor
    queue: Tensor
    teacher: Tensor | None
    """The momentum encoder's queries; None without soft targets."""
    alpha: float


def providers(spec: Queue, device: torch.device) -> list[Provider]:
    """The peers of a device; inputs are query and temperature."""
    note = "ALBEF's formulation" if spec.teacher is not None else "MoCo's formulation"
    eager = _soft(spec) if spec.teacher is not None else _hard(spec)
    found = [
        *also_compiled("eager", eager, note),
        Provider(
            name="chunked",
            build=lambda: _chunked(spec),
            note=f"{CHUNK} candidates at a time, loss and gradient in one sweep",
        ),
    ]
    if spec.teacher is None:
        found.append(library.liger_queue(spec.key, spec.queue, device))
    return found


def _soft(spec: Queue) -> Function:
    """Targets as a matrix: the teacher's softmax mixed with the identity."""
    assert spec.teacher is not None
    teacher = spec.teacher

    def function(query: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
        candidates = torch.cat([spec.key, spec.queue]).T
        scale = 1 / temperature.to(query.dtype)
        logits = query @ candidates * scale
        with torch.no_grad():
            positives = torch.zeros_like(logits).fill_diagonal_(1)
            soft = (teacher @ candidates * scale).softmax(1)
            targets = spec.alpha * soft + (1 - spec.alpha) * positives
        return (-(logits.log_softmax(1) * targets).sum(1).mean(),)

    return function


def _hard(spec: Queue) -> Function:
    """Cross-entropy whose label is the row's own number."""

    def function(query: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
        candidates = torch.cat([spec.key, spec.queue]).T
        logits = query @ candidates / temperature.to(query.dtype)
        return (F.cross_entropy(logits, torch.arange(len(query), device=query.device)),)

    return function


class _Chunked(torch.autograd.Function):
    """Sums relative to the positive's logit, which at this temperature cannot overflow."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, temperature: Tensor, spec: Queue) -> Tensor:
        scale = (1 / temperature).float()
        wanted = any(ctx.needs_input_grad[:2])
        student = _Sums(query, scale, wanted)
        teacher = None if spec.teacher is None else _Sums(spec.teacher, scale, wanted)
        for part in (spec.key, *spec.queue.split(CHUNK)):
            logits = student.logits(part)
            student.add(part, logits, logits)
            if teacher is not None:
                teacher.add(part, teacher.logits(part), logits)
        loss, moment = student.total.log(), student.value / student.total
        if teacher is not None:
            soft = spec.alpha * teacher.value / teacher.total
            loss, moment = loss - soft, moment - soft
        if wanted:
            grad = student.mean_candidate() - (1 - spec.alpha) * spec.key
            if teacher is not None:
                grad -= spec.alpha * teacher.mean_candidate()
            grad_query = (grad * (scale / len(query))).to(query.dtype)
            ctx.save_for_backward(grad_query, -scale * moment.mean())
        return loss.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        by_query, by_temperature = ctx.saved_tensors
        return by_query * grad, by_temperature * grad, None


class _Sums:
    """Over the candidates, the positives first, weighted by exp(logit - positive's logit)."""

    def __init__(self, query: Tensor, scale: Tensor, candidates: bool) -> None:
        self.query, self.scale = query, scale
        self.own: Tensor | None = None
        self.total, self.value = torch.zeros(2, len(query), device=query.device)
        self.candidate = None
        if candidates:
            self.candidate = torch.zeros_like(query, dtype=torch.float32)

    def logits(self, part: Tensor) -> Tensor:
        logits = (self.query @ part.T).float().mul_(self.scale)
        if self.own is None:
            self.own = logits.diagonal()[:, None].clone()
        return logits.sub_(self.own)

    def add(self, part: Tensor, logits: Tensor, values: Tensor) -> None:
        weights = logits.exp()
        self.total += weights.sum(1)
        self.value += torch.linalg.vecdot(weights, values)
        if self.candidate is not None:
            self.candidate += weights.to(part.dtype) @ part

    def mean_candidate(self) -> Tensor:
        assert self.candidate is not None
        return self.candidate / self.total[:, None]


def _chunked(spec: Queue) -> Function:
    return lambda query, temperature: (_Chunked.apply(query, temperature, spec),)

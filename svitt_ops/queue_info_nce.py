"""`queue_info_nce`: schema, validation, autograd, FLOPs and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svitt_ops import _flops, _library, _validation
from svitt_ops._ops import ops
from svitt_ops._validation import (
    check_embeddings,
    check_ids,
    check_rows,
    check_temperature,
    unit_stride,
)
from svitt_ops.reference.queue_info_nce import among_candidates
from svitt_ops.reference.queue_info_nce import gradients as _gradients
from svitt_ops.reference.queue_info_nce import queue_info_nce as _reference

_OP = "queue_info_nce"


def queue_info_nce(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float | Tensor,
    *,
    teacher_query: Tensor | None = None,
    alpha: float = 0.0,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
) -> Tensor:
    """Contrastive loss of queries against a batch of keys and a queue of older ones.

    With the candidates ``c = [key; queue]`` and ``p_i = softmax_j(query_i . c_j / temperature)``,
    ``loss = -1/B sum_i sum_j target_ij log p_ij``, where ``target = alpha softmax_j(teacher_query_i
    . c_j / temperature) + (1 - alpha) y`` and y spreads evenly over the positives. One sweep over
    the candidates gives loss and gradients, as attention whose keys are its values; similarities
    are never stored. Positives are summed apart from the negatives, and maxima are followed, so
    that converged pairs and temperatures down to 0.001 keep their digits. Nothing is read on the
    host. The result is bitwise the same on every run.

    Keys and queue come from a momentum encoder: they, and the teacher, receive no gradient.

    Args:
        query: L2-normalised embeddings ``(B, D)``, fp32, fp16 or bf16; normalisation is not
            checked. Under autocast all embeddings take the autocast dtype.
        key: like ``query``; row i belongs to row i of ``query``.
        queue: ``(Q, D)``, at least one row.
        temperature: a positive float, or a tensor of one element that receives its gradient.
        teacher_query: ``(B, D)``, the momentum encoder's embeddings of what ``query`` embeds.
        alpha: share of the teacher in the targets, in [0, 1].
        query_ids: int64 or int32 ``(B,)``. Candidates of the same id are positives; by default
            row i of ``key`` alone. A query without positives has the teacher's part of the loss.
        key_ids: ``(B,)``, only with ``query_ids``, which they are by default.
        queue_ids: ``(Q,)``, only with ``query_ids``; by default the queue has no positives.

    Returns:
        The loss, a fp32 scalar. Where a logit is NaN, infinite or beyond 1e9, which leaves fp32 no
        digits, or where the temperature is not positive and finite, it is NaN, and so are the
        gradients of the temperature and of the queries concerned: all that saw the candidate.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
        NotImplementedError: for a forward-mode or a second derivative.

    Complexity:
        ``4 B (B + Q) D`` FLOP, twice that with a teacher, all of it forward; memory
        ``O((B + Q) D)``.

    Source:
        ALBEF (NeurIPS 2021), equations 1, 2 and 6; SIMLA (ECCV 2022); MoCo (CVPR 2020), the queue.
    """
    query, key, queue, teacher_query = _validation.autocast(query, key, queue, teacher_query)
    check_embeddings(_OP, "query", query)
    check_embeddings(_OP, "key", key, query, paired=True)
    check_embeddings(_OP, "queue", queue, query)
    check_rows(_OP, "query", query)
    check_rows(_OP, "queue", queue)
    alpha = _validation.check_float(_OP, "alpha", alpha)
    if not 0 <= alpha <= 1:
        raise ValueError(f"{_OP}: alpha must be in [0, 1], got {alpha}")
    if teacher_query is not None:
        check_embeddings(_OP, "teacher_query", teacher_query, query, paired=True)
    elif alpha > 0:
        raise ValueError(f"{_OP}: teacher_query must be given where alpha > 0, got None")
    if alpha == 0:
        teacher_query = None
    temperature = check_temperature(_OP, temperature, query)
    if query_ids is not None:
        query_ids = check_ids(_OP, "query_ids", query_ids, query.shape[0], query.device)
        key_ids = query_ids if key_ids is None else key_ids
        key_ids = check_ids(_OP, "key_ids", key_ids, query.shape[0], query.device)
        if queue_ids is not None:
            queue_ids = check_ids(_OP, "queue_ids", queue_ids, queue.shape[0], query.device)
    elif key_ids is not None or queue_ids is not None:
        raise ValueError(f"{_OP}: query_ids must be given with key_ids or queue_ids, got None")
    query, key, queue = (unit_stride(x) for x in (query, key.detach(), queue.detach()))
    if teacher_query is not None:
        teacher_query = unit_stride(teacher_query.detach())
    loss, _, _ = ops.queue_info_nce(
        query, key, queue, temperature, teacher_query, alpha, query_ids, key_ids, queue_ids, False
    )
    return loss


def _outputs(query: Tensor, gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    shape = tuple(query.shape) if gradients else (0, query.shape[1])
    return (
        query.new_empty((), dtype=torch.float32),
        query.new_empty(shape, dtype=torch.float32),
        query.new_empty((), dtype=torch.float32),
    )


def _fake(query: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(query, args[-1])


def _cpu(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: Tensor,
    teacher_query: Tensor | None,
    alpha: float,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    queue_ids: Tensor | None,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op from the reference."""
    results = _outputs(query, gradients)
    query, key, queue, temperature = (x.double() for x in (query, key, queue, temperature))
    teacher = None if teacher_query is None else teacher_query.double()
    exact = _reference(
        query, key, queue, temperature, teacher_query=teacher, alpha=alpha,
        query_ids=query_ids, key_ids=key_ids, queue_ids=queue_ids,
    )  # fmt: skip
    found = [exact]
    if gradients:
        same = among_candidates(query, key, queue, query_ids, key_ids, queue_ids)
        candidates = torch.cat([key, queue])
        found += _gradients(query, candidates, temperature, teacher, alpha, same)
    for to, x in zip(results, found, strict=False):
        to.copy_(x)
    return results


def _backward_fake(grad_loss: Tensor, query: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
    return args[1].new_empty(args[1].shape, dtype=query.dtype), torch.empty_like(grad_loss)


def _backward_cpu(grad_loss: Tensor, query: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
    _, grad_query, grad_temperature = args
    return (grad_query * grad_loss).to(query.dtype), grad_temperature * grad_loss


_library.define(
    f"{_OP}(Tensor query, Tensor key, Tensor queue, Tensor temperature, Tensor? teacher_query, "
    "float alpha, Tensor? query_ids, Tensor? key_ids, Tensor? queue_ids, bool gradients) -> "
    "(Tensor loss, Tensor grad_query, Tensor grad_temperature)",
    fake=_fake,
    cpu=_cpu,
    cuda_module=_OP,
)
_library.define(
    # Query and temperature are here so that a second derivative by either is refused.
    f"{_OP}_backward(Tensor grad_loss, Tensor query, Tensor temperature, Tensor grad_query, "
    "Tensor grad_temperature) -> (Tensor, Tensor)",
    fake=_backward_fake,
    cpu=_backward_cpu,
    cuda_module=_OP,
    compiled=False,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], inputs[3], *output[1:])


def _backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    grads = ops.queue_info_nce_backward(grad_loss, *ctx.saved_tensors)
    return grads[0], None, None, grads[1]


def _with_gradients(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return *args[:-1], True


_library.differentiate(_OP, _backward, _setup_context, _with_gradients)


def _count_flops(*args: Any) -> int:
    query, queue, teacher, gradients = args[0], args[2], args[4], args[9]
    products = (1 if teacher is None else 2) * (2 if gradients else 1)
    rows, dim = query.shape
    return products * 2 * rows * (rows + queue.shape[0]) * dim


_flops.register(_OP, _count_flops)
_flops.register(f"{_OP}_backward", lambda *args: 0)

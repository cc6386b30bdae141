"""`sigmoid_nce`: schema, validation, autograd, FLOPs, the distributed form and the function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svitt_ops import _flops, _library, _ranks, _validation
from svitt_ops._ops import ops
from svitt_ops.reference.sigmoid_nce import sums as _sums

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_OP = "sigmoid_nce"


def sigmoid_nce(
    query: Tensor,
    key: Tensor,
    temperature: float | Tensor,
    bias: float | Tensor,
    *,
    ids: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Sigmoid loss of all pairs of rows, without the matrix of their similarities.

    ``loss = 1/B sum_i sum_j softplus(-z_ij (query_i . key_j / temperature + bias))``, where z is 1
    for a pair that belongs together and else -1: each pair is a decision of its own. As no row
    waits for another one's sum, one sweep gives loss and gradients. ``softplus(x)`` is ``max(x, 0)
    + log1p(exp(-abs(x)))``, so that logits of any size keep their digits. Nothing is read on the
    host. The result is bitwise the same on every run.

    Args:
        query: L2-normalised embeddings ``(B, D)``, fp32, fp16 or bf16; normalisation is not
            checked. Under autocast query and key take the autocast dtype.
        key: like ``query``; row i belongs to row i of ``query``.
        temperature: a positive float, or a tensor of one element that receives its gradient. The
            paper learns ``log(1 / temperature)``, from a temperature of 0.1 on.
        bias: a finite float, or a tensor of one element that receives its gradient. The paper
            begins with -10, as if all pairs were known to be negatives.
        ids: int64 or int32 ``(B,)``. Rows with equal ids belong together; by default row i of
            ``query`` and of ``key`` alone.
        group: ranks that hold parts of one batch, of equal size. Every rank returns the loss of
            the whole batch, and gradients such that their mean over the ranks, which is what DDP
            takes, is the gradient of that loss: of the embeddings the number of ranks times the
            rank's own part, of temperature and bias all of it.

    Returns:
        The loss, a fp32 scalar. Where a logit before its bias, or the bias, is NaN, infinite or
        beyond 1e9, or where the temperature is not positive and finite, the loss and all gradients
        are NaN, on every rank.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
        NotImplementedError: for a forward-mode or a second derivative.

    Complexity:
        ``2 B B D`` FLOP, three times that with gradients, all of it forward; memory ``O(B D)``.

    Source:
        SigLIP (ICCV 2023), algorithm 1.
    """
    query, key = _validation.autocast(query, key)
    _validation.check_embeddings(_OP, "query", query)
    _validation.check_embeddings(_OP, "key", key, query, paired=True)
    _validation.check_rows(_OP, "query", query)
    query, key = _validation.unit_stride(query), _validation.unit_stride(key)
    temperature = _validation.check_temperature(_OP, temperature, query)
    bias = _validation.check_bias(_OP, bias, query)
    if ids is not None:
        ids = _validation.check_ids(_OP, "ids", ids, query.shape[0], query.device)
    inputs = (query, key, temperature, bias)
    if group is None:
        return ops.sigmoid_nce(*inputs, ids, ids, 0, False)[0]
    _ranks.check_group(_OP, group)
    # A Function's own forward is told neither of tangents nor of whether a gradient is wanted.
    _library.refuse_tangents(_OP, inputs)
    gradients = torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)
    return _RankLoss.apply(*inputs, ids, gradients, group)[0]


def _fake(query: Tensor, key: Tensor, *args: Any) -> tuple[Tensor, ...]:
    gradients = args[-1]
    shapes = [(x.shape[0] if gradients else 0, x.shape[1]) for x in (query, key)]
    return tuple(query.new_empty(x, dtype=torch.float32) for x in ((), *shapes, (), ()))


def _cpu(
    query: Tensor,
    key: Tensor,
    temperature: Tensor,
    bias: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    first_row: int,
    gradients: bool,
) -> tuple[Tensor, ...]:
    """The op from the reference."""
    query, key, temperature, bias = (x.double() for x in (query, key, temperature, bias))
    loss, *grads = _sums(query, key, temperature, bias, query_ids, key_ids, first_row)
    rows = slice(None if gradients else 0)
    found = (loss, grads[0][rows], grads[1][rows], *grads[2:])
    return tuple(x.to(torch.float32, memory_format=torch.contiguous_format) for x in found)


def _backward_fake(grad_loss: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(grad, dtype=x.dtype) for x, grad in zip(args[:4], args[4:], strict=True)
    )


def _backward_cpu(grad_loss: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
    """The gradients were computed with the loss: what comes from above multiplies them."""
    # Every pair has its part in the bias's: it is NaN where any logit is none.
    factor = grad_loss + 0 * args[-1]
    return tuple((grad * factor).to(x.dtype) for x, grad in zip(args[:4], args[4:], strict=True))


_INPUTS = "Tensor query, Tensor key, Tensor temperature, Tensor bias"
_GRADS = "Tensor grad_query, Tensor grad_key, Tensor grad_temperature, Tensor grad_bias"
_library.define(
    f"{_OP}({_INPUTS}, Tensor? query_ids, Tensor? key_ids, int first_row, bool gradients)"
    f" -> (Tensor loss, {_GRADS})",
    fake=_fake,
    cpu=_cpu,
    cuda_module=_OP,
)
_library.define(
    # The inputs are here so that a second derivative by any is refused.
    f"{_OP}_backward(Tensor grad_loss, {_INPUTS}, {_GRADS}) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    cpu=_backward_cpu,
    cuda_module=_OP,
    compiled=False,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4], *output[1:])


def _backward(ctx: Any, grad_loss: Tensor) -> Any:
    return ops.sigmoid_nce_backward(grad_loss, *ctx.saved_tensors)


def _with_gradients(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return *args[:-1], True


_library.differentiate(_OP, _backward, _setup_context, _with_gradients)


class _RankLoss(torch.autograd.Function):
    """Each rank computes the strip of its own queries against the keys of all ranks.

    All that crosses ranks does so forward, and is O(B D): the keys, their gradients, four sums.
    """

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        temperature: Tensor,
        bias: Tensor,
        ids: Tensor | None,
        gradients: bool,
        group: ProcessGroup,
    ) -> tuple[Tensor, ...]:
        """The loss, and its gradients."""
        dist = torch.distributed
        first, ranks = _ranks.first_row(_OP, query, group), dist.get_world_size(group)
        keys = _ranks.gather(key.detach(), group)
        all_ids = None if ids is None else _ranks.gather(ids, group)
        loss, grad_query, grad_keys, *of_scalars = ops.sigmoid_nce(
            query.detach(), keys, temperature, bias, ids, all_ids, first, gradients
        )
        sums = torch.stack([loss, *of_scalars])
        dist.all_reduce(sums, group=group)
        if gradients:
            dist.all_reduce(grad_keys, group=group)
        own = grad_keys[first : first + query.shape[0]]
        loss, *of_scalars = sums.unbind()
        return loss.clone(), grad_query * ranks, own * ranks, *(x.clone() for x in of_scalars)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        _setup_context(ctx, inputs, output)

    @staticmethod
    def vmap(*_: Any) -> None:
        _ranks.refuse_vmap(_OP)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        found = (None,) * 4 if grad_loss is None else _backward(ctx, grad_loss)
        return *found, *(None,) * 3


def _count_flops(*args: Any) -> int:
    query, key, gradients = args[0], args[1], args[7]
    return (3 if gradients else 1) * 2 * query.shape[0] * key.shape[0] * query.shape[1]


_flops.register(_OP, _count_flops)
_flops.register(f"{_OP}_backward", lambda *args: 0)

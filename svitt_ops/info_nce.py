"""`info_nce`: schema, validation, autograd, FLOPs, the distributed form and the public function."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svitt_ops import _flops, _library, _ranks, _validation
from svitt_ops._ops import ops
from svitt_ops.reference.info_nce import gradients, statistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_OP = "info_nce"
STATISTICS = 6
"""Rows of the statistics: log-sum-exp over the negatives, the same over the positives, number of
positives, weighted sum of the positives' dot products, sum of all dot products, sum of the
positives' weights. In fp64: a rounded log-sum-exp would cost digits where logits are large."""


def info_nce(
    query: Tensor,
    key: Tensor,
    temperature: float | Tensor,
    *,
    ids: Tensor | None = None,
    weights: Tensor | None = None,
    symmetric: bool = True,
    label_smoothing: float = 0.0,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Contrastive loss of matching rows, without the matrix of all their similarities.

    ``loss = -1/B sum_i sum_j y_ij log softmax_j(query_i . key_j / temperature)``, and with
    ``symmetric`` the mean of this and the same with the roles exchanged. The negatives are summed
    apart from the positives, so that the loss and its gradient stay exact once pairs converge, and
    maxima are followed, so that temperatures down to 0.001 neither overflow nor vanish. Nothing is
    read on the host. The result is bitwise the same on every run.

    Args:
        query: L2-normalised embeddings ``(B, D)``, fp32, fp16 or bf16; normalisation is not
            checked. Under autocast query and key take the autocast dtype.
        key: like ``query``; row i belongs to row i of ``query``.
        temperature: a positive float, or a tensor of one element that receives its gradient.
        ids: int64 or int32 ``(B,)``. Rows with equal ids are positives of each other,
            ``y_ij = [id_i = id_j] / count_i``; by default each row has its own.
        weights: floating ``(B,)``, a weight of at least 0 for each key, which receives no gradient:
            a row's targets are its positives' weights over their sum. With the roles exchanged, a
            query has that of its key. Without ``ids`` each row has one positive, of whatever
            weight.
        symmetric: whether queries are also looked for among all keys' candidates.
        label_smoothing: share of the target that is spread evenly over all B candidates.
        group: ranks that hold parts of one batch, of equal size. Every rank returns the loss of
            the whole batch, and gradients such that their mean over the ranks, which is what DDP
            takes, is the gradient of that loss: of the embeddings the number of ranks times the
            rank's own part, of the temperature all of it.

    Returns:
        The loss, a fp32 scalar. Where a logit is NaN, infinite or beyond 1e9, which leaves fp32 no
        digits, where the temperature is not positive and finite, or where a row's positives weigh
        nothing, the loss and all gradients are NaN, on every rank.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
        NotImplementedError: for a forward-mode or a second derivative.

    Complexity:
        ``2 B B D`` FLOP forward and 3 times that backward; memory ``O(B D)``.

    Source:
        CPC (2018), equation 4; CLIP (2021), figure 3; SViTT (CVPR 2023), equations 12 and 13.
    """
    query, key = _validation.autocast(query, key)
    _validation.check_embeddings(_OP, "query", query)
    _validation.check_embeddings(_OP, "key", key, query, paired=True)
    _validation.check_rows(_OP, "query", query)
    query, key = _validation.unit_stride(query), _validation.unit_stride(key)
    temperature = _validation.check_temperature(_OP, temperature, query)
    if ids is not None:
        ids = _validation.check_ids(_OP, "ids", ids, query.shape[0], query.device)
    if weights is not None:
        weights = _validation.check_weights(_OP, "weights", weights, query.shape[0], query.device)
        weights = None if ids is None else weights
    symmetric = _validation.check_flag(_OP, "symmetric", symmetric)
    label_smoothing = _validation.check_float(_OP, "label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{_OP}: label_smoothing must be in [0, 1), got {label_smoothing}")
    if group is not None:
        _ranks.check_group(_OP, group)
        # A Function's own forward is not told of tangents that reach it beside a gradient.
        _library.refuse_tangents(_OP, (query, key, temperature))
        found = _RankLoss.apply(
            query, key, temperature, ids, weights, symmetric, label_smoothing, group
        )
        return found[0]
    loss, _, _ = ops.info_nce(
        query, key, temperature, ids, ids, weights, weights, 0, symmetric, label_smoothing
    )
    return loss


def losses(stats: Tensor, temperature: Tensor, choices: int, label_smoothing: float) -> Tensor:
    """Loss of each row from its statistics ``(6, rows)``, where a row has ``choices`` candidates.

    ``-log softmax`` of a positive is ``log(1 + negatives / positives)`` and no difference of large
    numbers; what several positives add is the spread among them.
    """
    negative, positive, count, same, every, weight = stats
    spread = positive - same / weight / temperature
    spread = torch.where(count == 1, 0, spread)
    smooth = label_smoothing * (same / weight - every / choices) / temperature
    return spread + torch.logaddexp(negative - positive, torch.zeros_like(negative)) + smooth


def _fake(query: Tensor, key: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    columns = key.shape[0] if args[-2] else 0
    stats = [query.new_empty(STATISTICS, n, dtype=torch.float64) for n in (query.shape[0], columns)]
    return query.new_empty((), dtype=torch.float32), stats[0], stats[1]


def _cpu(
    query: Tensor,
    key: Tensor,
    temperature: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    query_weights: Tensor | None,
    key_weights: Tensor | None,
    first_row: int,
    symmetric: bool,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op from the reference."""
    inputs = (query.double(), key.double(), temperature.double())
    rows, columns = statistics(*inputs, query_ids, key_ids, query_weights, key_weights, first_row)
    columns = columns if symmetric else columns[:, :0]
    means = [
        losses(x, temperature, key.shape[0], label_smoothing).mean()
        for x in (rows, columns)
        if x.numel()
    ]
    return torch.stack(means).mean().float(), rows, columns.contiguous()


def _backward_fake(
    grad_loss: Tensor, query: Tensor, key: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float32 if args[-1] else query.dtype
    grads = [
        torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        for x in (query, key)
    ]
    return grads[0], grads[1], query.new_empty((), dtype=torch.float32)


def _backward_cpu(
    grad_loss: Tensor,
    query: Tensor,
    key: Tensor,
    temperature: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    query_weights: Tensor | None,
    key_weights: Tensor | None,
    first_row: int,
    rows: Tensor,
    columns: Tensor,
    label_smoothing: float,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's gradient from the reference."""
    both = columns.numel() > 0
    factor = grad_loss.double() / (key.shape[0] * (2 if both else 1))
    other = columns if both else None
    inputs = (query.double(), key.double(), temperature.double())
    grads = gradients(
        *inputs, query_ids, key_ids, query_weights, key_weights, first_row, rows, other,
        label_smoothing, factor,
    )  # fmt: skip
    dtype = torch.float32 if wide else query.dtype
    return grads[0].to(dtype), grads[1].to(dtype), grads[2].float()


_PAIR = (
    "Tensor query, Tensor key, Tensor temperature, Tensor? query_ids, Tensor? key_ids, "
    "Tensor? query_weights, Tensor? key_weights"
)
_library.define(
    f"{_OP}({_PAIR}, int first_row, bool symmetric, float label_smoothing)"
    " -> (Tensor loss, Tensor rows, Tensor columns)",
    fake=_fake,
    cpu=_cpu,
    cuda_module=_OP,
)
_library.define(
    f"{_OP}_backward(Tensor grad_loss, {_PAIR}, int first_row, Tensor rows, Tensor columns, "
    "float label_smoothing, bool wide) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_temperature)",
    fake=_backward_fake,
    cpu=_backward_cpu,
    cuda_module=f"{_OP}_backward",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], *output[1:])
    ctx.first_row, ctx.label_smoothing = inputs[7], inputs[9]


def _backward(ctx: Any, grad_loss: Tensor) -> Any:
    *inputs, rows, columns = ctx.saved_tensors
    return ops.info_nce_backward(
        grad_loss, *inputs, ctx.first_row, rows, columns, ctx.label_smoothing, False
    )


_library.differentiate(_OP, _backward, _setup_context)


class _RankLoss(torch.autograd.Function):
    """Each rank computes the strip of its own queries against the keys of all ranks.

    Its rows are complete, its columns are put together from all ranks' parts. What crosses ranks is
    O(B D): the keys forward, their gradients backward, and the statistics of the columns.
    """

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        temperature: Tensor,
        ids: Tensor | None,
        weights: Tensor | None,
        symmetric: bool,
        label_smoothing: float,
        group: ProcessGroup,
    ) -> tuple[Tensor | None, ...]:
        """The loss, and what the backward needs."""
        first = _ranks.first_row(_OP, query, group)
        keys = _ranks.gather(key.detach(), group)
        all_ids = None if ids is None else _ranks.gather(ids, group)
        all_weights = None if weights is None else _ranks.gather(weights, group)
        total = len(keys)
        inputs = (query.detach(), keys, temperature, ids, all_ids, weights, all_weights, first)
        _, rows, columns = ops.info_nce(*inputs, symmetric, label_smoothing)
        means = losses(rows, temperature, total, label_smoothing).sum() / total
        means = _ranks.gather(means.reshape(1), group).sum()
        if symmetric:
            parts = _ranks.gather(columns[None], group)
            columns = torch.cat([parts[:, :2].logsumexp(0), parts[:, 2:].sum(0)])
            means = (means + losses(columns, temperature, total, label_smoothing).mean()) / 2
        rows = rows + 0 * means  # NaN tells the backward of every rank
        return means.float(), keys, all_ids, all_weights, rows, columns

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        query, _, temperature, ids, weights, _, label_smoothing, group = inputs
        _, keys, all_ids, all_weights, rows, columns = output
        ctx.mark_non_differentiable(*(x for x in output[1:] if x is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            query, keys, temperature, ids, all_ids, weights, all_weights, rows, columns
        )
        dist = torch.distributed
        ctx.strip = (dist.get_rank(group), dist.get_world_size(group), query.shape[0])
        ctx.label_smoothing = label_smoothing
        # A loss that outlives its group must not keep it: gloo's threads abort a process at exit.
        ctx.group = weakref.ref(group)

    @staticmethod
    def vmap(*_: Any) -> None:
        _ranks.refuse_vmap(_OP)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 8
        if torch._C._functorch.is_batchedtensor(grad_loss):
            _RankLoss.vmap()
        *inputs, rows, columns = ctx.saved_tensors
        rank, ranks, local = ctx.strip
        group = ctx.group()
        if group is None or not torch.distributed.is_initialized():
            raise RuntimeError(f"{_OP}: group must exist until the backward, and was destroyed")
        grad_query, grad_keys, grad_temperature = ops.info_nce_backward(
            grad_loss, *inputs, rank * local, rows, columns, ctx.label_smoothing, True
        )
        torch.distributed.all_reduce(grad_keys, group=group)
        torch.distributed.all_reduce(grad_temperature, group=group)
        grad_key = grad_keys[rank * local : (rank + 1) * local]
        dtype = inputs[0].dtype
        grads = ((grad_query * ranks).to(dtype), (grad_key * ranks).to(dtype), grad_temperature)
        return *grads, *(None,) * 5


def _count_flops(query: Tensor, key: Tensor) -> int:
    return 2 * query.shape[0] * key.shape[0] * query.shape[1]


_flops.register(_OP, lambda *args: _count_flops(args[0], args[1]))
_flops.register(f"{_OP}_backward", lambda *args: 3 * _count_flops(args[1], args[2]))

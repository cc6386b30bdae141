"""`select_tokens` and `prune_tokens`: schemas, validation, autograd and the public functions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from svitt_ops import _flops, _library, _validation
from svitt_ops._ops import ops
from svitt_ops.reference import token_pruning as reference
from svitt_ops.reference.token_pruning import PrunedTokens

_SELECT, _PRUNE, _BACKWARD = "select_tokens", "prune_tokens", "prune_tokens_backward"
_MODULE = "token_pruning"


def keep_count(keep_rate: float, num_tokens: int) -> int:
    """Tokens that a keep rate leaves: ``ceil(round(keep_rate * num_tokens, 9))``.

    Rounding first keeps float noise from adding a token: 0.55 of 100 is 55, though the product is
    55.00000000000001.

    Args:
        keep_rate: more than 0, at most 1.
        num_tokens: tokens that may be pruned, globals not counted.

    Returns:
        The number of tokens to keep.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    num_tokens = _validation.check_count("keep_count", "num_tokens", num_tokens)
    return _count("keep_count", keep_rate, num_tokens)


def select_tokens(scores: Tensor, keep: int) -> Tensor:
    """Positions of the highest scores, in the order of the sequence.

    The first ``keep`` of ``torch.sort(scores, descending=True, stable=True)``, sorted by position:
    of equal scores (0 and -0 are equal) the lower index wins. NaN comes last, after -inf.

    Args:
        scores: ``(batch, num_tokens)``, fp32, fp16 or bf16, compared exactly.
        keep: 1 to ``num_tokens``; 0 where there are no tokens.

    Returns:
        int64 ``(batch, keep)``, ascending.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Complexity:
        Linear in tokens, one pass for each 8 bits of a score (bits, in Triton).

    Source:
        SViTT (CVPR 2023), section 3.3, "node sparsity".
    """
    _check_scores(_SELECT, scores)
    keep = _check_keep(_SELECT, keep, scores.shape[1])
    return ops.select_tokens(_validation.unit_stride(scores.detach()), keep)


def prune_tokens(
    tokens: Tensor,
    scores: Tensor,
    *,
    keep: int | None = None,
    keep_rate: float | None = None,
    num_global: int = 1,
    position_codes: Tensor | None = None,
) -> PrunedTokens:
    """Keep the global tokens and those with the highest scores, in the order of the sequence.

    For each sample, with g global tokens, ``out`` is ``tokens[:g]`` followed by ``tokens[g + i]``
    for i in ``select_tokens(scores, keep)``. The gradient of ``tokens`` is that of what was kept
    and 0 elsewhere, a gather that writes each element once; ``scores`` receive none. Rows are
    copied bit for bit, and autocast casts nothing.

    Args:
        tokens: ``(batch, num_global + num_tokens, dim)``, fp32, fp16 or bf16. Any strides with a
            contiguous last dimension.
        scores: ``(batch, num_tokens)``, as for `select_tokens`, of any of these dtypes.
        keep: tokens to keep, 1 to ``num_tokens``; give this or ``keep_rate``.
        keep_rate: the share of tokens to keep, see `keep_count`.
        num_global: tokens at the start that are always kept.
        position_codes: int32 ``(num_tokens,)`` or ``(batch, num_tokens)``, see
            `svitt_ops.position_codes`.

    Returns:
        `PrunedTokens`: ``tokens (batch, num_global + keep, dim)``, ``indices`` int64
        ``(batch, keep)``, which start at 0 after the globals, and the kept tokens'
        ``position_codes`` int32 ``(batch, keep)``, or None if none were given.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
        NotImplementedError: for a forward-mode or a second derivative.

    Complexity:
        No FLOP. Forward reads and writes ``batch * (num_global + keep)`` rows of ``dim``; backward
        reads as many and writes ``batch * (num_global + num_tokens)``.

    Source:
        SViTT (CVPR 2023), section 3.3, "node sparsity".
    """
    _validation.check_tensor(_PRUNE, "tokens", tokens)
    if tokens.dim() != 3:
        raise ValueError(
            f"{_PRUNE}: tokens must have shape (batch, tokens, dim), got {tuple(tokens.shape)}"
        )
    batch, length, dim = tokens.shape
    if dim > 1 and tokens.stride(2) != 1:
        raise ValueError(
            f"{_PRUNE}: tokens must have a contiguous last dimension, got strides {tokens.stride()}"
        )
    num_global = _validation.check_count(_PRUNE, "num_global", num_global)
    if num_global > length:
        raise ValueError(f"{_PRUNE}: num_global must be at most {length}, got {num_global}")
    num_tokens = length - num_global
    _check_scores(_PRUNE, scores, tokens)
    if scores.shape != (batch, num_tokens):
        raise ValueError(
            f"{_PRUNE}: scores must have shape ({batch}, {num_tokens}), got {tuple(scores.shape)}"
        )
    if (keep is None) == (keep_rate is None):
        given = "neither" if keep is None else "both"
        raise ValueError(f"{_PRUNE}: keep or keep_rate must be given, got {given}")
    if keep_rate is not None:
        keep = _count(_PRUNE, keep_rate, num_tokens)
    keep = _check_keep(_PRUNE, keep, num_tokens)
    if position_codes is not None:
        shapes = ((num_tokens,), (1, num_tokens), (batch, num_tokens))
        _validation.check_exact(
            _PRUNE, "position_codes", position_codes, (torch.int32,), shapes, tokens.device
        )
        rows = 1 if position_codes.dim() == 1 else position_codes.shape[0]
        position_codes = position_codes.reshape(rows, num_tokens).contiguous()
    out, indices, _, codes = ops.prune_tokens(
        tokens, _validation.unit_stride(scores.detach()), keep, num_global, position_codes
    )
    return PrunedTokens(out, indices, None if position_codes is None else codes)


def _count(op: str, keep_rate: float, num_tokens: int) -> int:
    keep_rate = _validation.check_float(op, "keep_rate", keep_rate, "a number")
    if not 0 < keep_rate <= 1:
        raise ValueError(f"{op}: keep_rate must be more than 0 and at most 1, got {keep_rate}")
    # As after `round`, whose C++ by torch's inductor is inexact: sizes would differ from Python's.
    return math.ceil(keep_rate * num_tokens - 5e-10)


def _check_keep(op: str, keep: Any, num_tokens: int) -> int:
    least = 1 if num_tokens > 0 else 0
    keep = _validation.check_int(op, "keep", keep)
    if not least <= keep <= num_tokens:
        raise ValueError(f"{op}: keep must be {least} to {num_tokens}, got {keep}")
    return keep


def _check_scores(op: str, scores: Tensor, tokens: Tensor | None = None) -> None:
    _validation.check_tensor(op, "scores", scores, None if tokens is None else tokens.device)
    if scores.dim() != 2:
        raise ValueError(f"{op}: scores must have shape (batch, tokens), got {tuple(scores.shape)}")


def _select_fake(scores: Tensor, keep: int) -> Tensor:
    return scores.new_empty((scores.shape[0], keep), dtype=torch.int64)


def _fake(
    tokens: Tensor, scores: Tensor, keep: int, num_global: int, position_codes: Tensor | None
) -> tuple[Tensor, ...]:
    batch, _, dim = tokens.shape
    out = tokens.new_empty((batch, num_global + keep, dim))
    inverse = scores.new_empty(scores.shape, dtype=torch.int32)
    shape = (0,) if position_codes is None else (batch, keep)
    return out, _select_fake(scores, keep), inverse, inverse.new_empty(shape)


def _backward_fake(grad_out: Tensor, inverse: Tensor, num_global: int) -> Tensor:
    batch, num_tokens = inverse.shape
    return grad_out.new_empty((batch, num_global + num_tokens, grad_out.shape[2]))


def _cpu(
    tokens: Tensor, scores: Tensor, keep: int, num_global: int, position_codes: Tensor | None
) -> tuple[Tensor, ...]:
    """The op from the reference."""
    out, indices, codes = reference.prune_tokens(
        tokens, scores, keep=keep, num_global=num_global, position_codes=position_codes
    )
    inverse = reference.inverse_of(indices, scores.shape[1])
    return out, indices, inverse, inverse.new_empty(0) if codes is None else codes


_library.define(
    f"{_SELECT}(Tensor scores, SymInt keep) -> Tensor indices",
    fake=_select_fake,
    cpu=reference.select_tokens,
    cuda_module=_MODULE,
    cuda_kernel=True,
)
_library.define(
    f"{_PRUNE}(Tensor tokens, Tensor scores, SymInt keep, SymInt num_global, "
    "Tensor? position_codes)"
    " -> (Tensor out, Tensor indices, Tensor inverse, Tensor codes)",
    fake=_fake,
    cpu=_cpu,
    cuda_module=_MODULE,
    cuda_kernel=True,
)
_library.define(
    f"{_BACKWARD}(Tensor grad_out, Tensor inverse, SymInt num_global) -> Tensor grad_tokens",
    fake=_backward_fake,
    cpu=reference.prune_backward,
    cuda_module=_MODULE,
    cuda_kernel=True,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2])
    ctx.num_global = inputs[3]


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor]:
    grad_out = _validation.unit_stride(grad_out)
    back = ops.prune_tokens_backward
    return (back(grad_out, *ctx.saved_tensors, ctx.num_global),)


_library.differentiate(_PRUNE, _backward, _setup_context)
# Nothing is computed, only moved.
for _name in (_SELECT, _PRUNE, _BACKWARD):
    _flops.register(_name, lambda *_: 0)

"""`cross_attention`: schema, validation, autograd, FLOPs and the public function."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from svitt_ops import _flops, _library, _validation
from svitt_ops._library import empty_attention, empty_like_heads
from svitt_ops._ops import ops
from svitt_ops.reference.cross_attention import Saliency, attend, attend_backward

_OP = "cross_attention"
_SALIENCIES: tuple[Saliency | None, ...] = (None, "cls", "mean")
"""What the schema's integer `saliency` stands for."""


@overload
def cross_attention(
    query: Tensor, key: Tensor, value: Tensor, *, key_padding_mask: Tensor | None = ...,
    scale: float | None = ..., return_saliency: None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def cross_attention(
    query: Tensor, key: Tensor, value: Tensor, *, key_padding_mask: Tensor | None = ...,
    scale: float | None = ..., return_saliency: Saliency,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def cross_attention(
    query: Tensor, key: Tensor, value: Tensor, *, key_padding_mask: Tensor | None = ...,
    scale: float | None = ..., return_saliency: Saliency | None,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    return_saliency: Saliency | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention from one sequence to another, with the attention that each key received.

    ``out_i = sum_j p_ij v_j`` with ``p_i = softmax_j(scale * q_i . k_j)`` over the keys ``j`` that
    the mask does not ignore. Accumulation and softmax are in fp32. The result is bitwise the same
    on every run. Made for few queries over many keys (text over video), right for any sizes. Under
    autocast query, key and value take the autocast dtype.

    Args:
        query: ``(batch, heads, queries, head_dim)``, fp32, fp16 or bf16, head_dim 8 to 256. Any
            strides with a contiguous last dimension, so that slices of a packed projection are
            read in place.
        key: ``(batch, heads, keys, head_dim)``, else like ``query``.
        value: like ``key``.
        key_padding_mask: bool ``(batch, keys)``, True where a key is ignored: what it holds, even
            NaN, changes nothing, and its gradient is zero. Queries left without a key return
            zeros.
        scale: factor of the logits, ``head_dim ** -0.5`` by default.
        return_saliency: also return the attention that each key received: ``"cls"`` from query 0,
            ``"mean"`` from all queries on average.

    Returns:
        ``out`` like ``query``, its memory laid out so that merging the heads is free; with
        ``return_saliency`` also ``saliency``, fp32 ``(batch, keys)``: softmaxed over the keys,
        averaged over heads, without gradient. NaN and infinities are never hidden: the rows that
        attend one, and its gradients, are not finite; only of a logit of -inf beside finite ones
        nothing comes.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
        NotImplementedError: for a forward-mode or a second derivative.

    Complexity:
        ``4 * head_dim * queries * keys`` FLOP per batch and head forward, 2.5 times that backward;
        memory linear in queries and keys.

    Source:
        Attention is all you need (NeurIPS 2017), equation 1; SViTT (CVPR 2023), section 3.3, for
        the saliency.
    """
    query, key, value = _validation.autocast(query, key, value)
    _validation.check_qkv(_OP, query, key, value, own_keys=True)
    if key_padding_mask is not None:
        shape = (key.shape[0], key.shape[2])
        _validation.check_exact(
            _OP, "key_padding_mask", key_padding_mask, (torch.bool,), (shape,), key.device
        )
        key_padding_mask = key_padding_mask.contiguous()
    scale = query.shape[-1] ** -0.5 if scale is None else _validation.check_scale(_OP, scale)
    known = return_saliency is None or isinstance(return_saliency, str)
    if not known or return_saliency not in _SALIENCIES:
        got = repr(return_saliency).partition("\n")[0]
        raise ValueError(f"{_OP}: return_saliency must be None, 'cls' or 'mean', got {got}")
    out, _, saliency = ops.cross_attention(
        query, key, value, key_padding_mask, scale, _SALIENCIES.index(return_saliency)
    )
    return (out, saliency.detach()) if return_saliency else out


def _fake(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, saliency: int
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_attention(query, (key.shape[0], key.shape[2]) if saliency else (0,))


def _backward_fake(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_like_heads(query), empty_like_heads(key), empty_like_heads(value)


def _cpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, saliency: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The op from the reference."""
    which = _SALIENCIES[saliency] or "cls"
    out, lse, received = attend(query, key, value, mask, scale, which, torch.float32)
    result = empty_like_heads(query).copy_(out)
    return result, lse.double(), received if saliency else received.new_empty(0)


def _backward_cpu(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    """The op's gradient from the reference."""
    grads = attend_backward(grad_out, query, key, value, mask, scale)
    inputs = (query, key, value)
    return tuple(empty_like_heads(x).copy_(g) for x, g in zip(inputs, grads, strict=True))


_library.define(
    f"{_OP}(Tensor query, Tensor key, Tensor value, Tensor? key_padding_mask, float scale, "
    "int saliency) -> (Tensor out, Tensor lse, Tensor saliency)",
    fake=_fake,
    cpu=_cpu,
    cuda_module=_OP,
)
_library.define(
    f"{_OP}_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor lse, Tensor? key_padding_mask, float scale) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    fake=_backward_fake,
    cpu=_backward_cpu,
    cuda_module=f"{_OP}_backward",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *output[:2], inputs[3])
    ctx.scale = inputs[4]


def _backward(ctx: Any, grad_out: Tensor) -> Any:
    grad_out = _validation.unit_stride(grad_out)
    return ops.cross_attention_backward(grad_out, *ctx.saved_tensors, ctx.scale)


_library.differentiate(_OP, _backward, _setup_context)


def _count_flops(query: Tensor, key: Tensor) -> int:
    """4 head_dim FLOP for each pair of query and key, ignored keys included."""
    batch, heads, queries, head_dim = query.shape
    return 4 * batch * heads * head_dim * queries * key.shape[2]


_flops.register(_OP, lambda *args: _count_flops(args[0], args[1]))
_flops.register(f"{_OP}_backward", lambda *args: _count_flops(args[1], args[2]) * 5 // 2)

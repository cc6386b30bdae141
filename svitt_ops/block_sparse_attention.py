"""`block_sparse_attention`: schema, validation, autograd, FLOPs and the public function."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from svitt_ops import _flops, _library, _validation
from svitt_ops._library import empty_attention, empty_like_heads
from svitt_ops._ops import ops
from svitt_ops.layout import BlockLayout
from svitt_ops.reference.block_sparse_attention import attend, attend_backward

_OP = "block_sparse_attention"
_LAYOUT = "Tensor key_counts, Tensor key_blocks, Tensor query_counts, Tensor query_blocks"
_SHARED = (
    f"{_LAYOUT}, int block_size, int num_global, "
    "Tensor? bias_table, Tensor? position_codes, Tensor? key_lengths, float scale"
)


@overload
def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, *,
    bias_table: Tensor | None = ..., position_codes: Tensor | None = ...,
    key_lengths: Tensor | None = ..., scale: float | None = ...,
    return_saliency: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, *,
    bias_table: Tensor | None = ..., position_codes: Tensor | None = ...,
    key_lengths: Tensor | None = ..., scale: float | None = ...,
    return_saliency: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, *,
    bias_table: Tensor | None = ..., position_codes: Tensor | None = ...,
    key_lengths: Tensor | None = ..., scale: float | None = ...,
    return_saliency: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    bias_table: Tensor | None = None,
    position_codes: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    return_saliency: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the blocks that a layout lists, with global tokens and a table bias.

    ``out_i = sum_j p_ij v_j`` with ``p_i = softmax_j(scale * q_i . k_j + bias_ij)`` over the keys
    ``j`` that the layout gives query ``i``. Accumulation and softmax are in fp32. The result is
    bitwise the same on every run. On a processor with AMX fp32 products are sums of bf16 ones, as
    exact for values of magnitudes 1e-30 to 3.3e38; an infinite one gives NaN. Under autocast query,
    key and value take the autocast dtype.

    Args:
        query: ``(batch, heads, tokens, head_dim)``, fp32, fp16 or bf16, ``layout.seq_len`` tokens,
            head_dim 8 to 256. Any strides with a contiguous last dimension, so that slices of a
            packed projection are read in place.
        key: like ``query``.
        value: like ``query``.
        layout: the pattern; leading dimensions ``()``, ``(heads,)`` or ``(batch, heads)``.
        bias_table: 3-D relative position bias ``(R, heads)`` as in BEiT; with g global tokens the
            last ``2 g + g g`` rows are global->token, token->global and global->global, the other
            R0 rows are indexed by ``code_i - code_j + (R0 - 1) / 2``.
        position_codes: int32 ``(num_tokens,)`` or ``(batch, num_tokens)``, see `position_codes`;
            given exactly when ``bias_table`` is. On a CPU codes too far apart for the table raise,
            elsewhere and under ``torch.compile`` another entry of the table is taken.
        key_lengths: int32 ``(batch,)``, tokens per sample that exist, globals included, 0 to
            ``tokens``; the others are not attended and their rows are zero.
        scale: factor of the logits, ``head_dim ** -0.5`` by default.
        return_saliency: also return the attention of the first global token.

    Returns:
        ``out`` like ``query``, its memory laid out so that merging the heads is free; with
        ``return_saliency`` also ``saliency``, fp32 ``(batch, num_tokens)``: the row of the first
        global token, softmaxed over all keys, averaged over heads, without gradient. NaN and
        infinities are never hidden: the rows that attend one, and its gradients, are not finite,
        and other rows of its head need not be; only of a logit of -inf beside finite ones nothing
        comes. Tokens beyond ``key_lengths`` may hold anything.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
        NotImplementedError: for a forward-mode or a second derivative.

    Complexity:
        ``4 * head_dim * layout.num_edges`` FLOP per batch and head forward, 2.5 times that
        backward; memory linear in tokens.

    Source:
        SViTT (CVPR 2023), equations 1-3; BEiT (ICLR 2022) for the bias.
    """
    query, key, value = _validation.autocast(query, key, value)
    _validation.check_qkv(_OP, query, key, value)
    batch, _, tokens, head_dim = query.shape
    _check_layout(layout, query)
    _validation.check_both(_OP, "bias_table", bias_table, "position_codes", position_codes)
    if bias_table is not None and position_codes is not None:
        position_codes = _check_bias(bias_table, position_codes, layout, query)
        bias_table = bias_table.float().contiguous()
    if key_lengths is not None:
        _validation.check_exact(
            _OP, "key_lengths", key_lengths, (torch.int32,), ((batch,),), query.device
        )
        _validation.check_range(_OP, "key_lengths", key_lengths, 0, tokens)
        key_lengths = key_lengths.contiguous()
    scale = head_dim**-0.5 if scale is None else _validation.check_scale(_OP, scale)
    return_saliency = _validation.check_flag(_OP, "return_saliency", return_saliency)
    if return_saliency and layout.num_global == 0:
        raise ValueError(f"{_OP}: return_saliency needs num_global of at least 1, got 0")
    out, _, saliency = ops.block_sparse_attention(
        query, key, value, *_lists_4d(layout), layout.block_size, layout.num_global,
        bias_table, position_codes, key_lengths, scale, return_saliency,
    )  # fmt: skip
    return (out, saliency.detach()) if return_saliency else out


def position_codes(
    shape: tuple[int, int, int], *, device: torch.device | str | None = None
) -> Tensor:
    """Codes of a (frames, rows, columns) grid whose differences index a BEiT 3-D bias table.

    ``code = (t (2 H - 1) + h) (2 W - 1) + w``, so that ``code_i - code_j`` is unique for every
    offset and lies within ``(R0 - 1) / 2`` of 0, with R0 = (2 T - 1) (2 H - 1) (2 W - 1).

    Args:
        shape: T frames, H rows, W columns of tokens.
        device: where the codes live.

    Returns:
        int32 ``(T * H * W,)`` in (t, h, w) order.
    """
    device = _validation.check_device("position_codes", device)
    sizes = _validation.check_grid("position_codes", "shape", shape)
    _, height, width = sizes
    t, h, w = (torch.arange(size, dtype=torch.int32, device=device) for size in sizes)
    rows = t.unsqueeze(1) * (2 * height - 1) + h
    return (rows.unsqueeze(2) * (2 * width - 1) + w).flatten()


def _check_layout(layout: BlockLayout, query: Tensor) -> None:
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"{_OP}: layout must be a BlockLayout, got {type(layout).__name__}")
    batch, heads, tokens, _ = query.shape
    if layout.seq_len != tokens:
        raise ValueError(f"{_OP}: layout must cover {tokens} tokens, got {layout.seq_len}")
    lead = (1, 1, *layout.key_counts.shape[:-1])[-2:]
    if lead[0] not in (1, batch) or lead[1] not in (1, heads):
        raise ValueError(
            f"{_OP}: layout must have leading dimensions (), ({heads},) or ({batch}, {heads}), "
            f"got {tuple(layout.key_counts.shape[:-1])}"
        )
    if layout.device != query.device:
        raise ValueError(f"{_OP}: layout must be on {query.device}, got {layout.device}")


def _check_bias(table: Tensor, codes: Tensor, layout: BlockLayout, query: Tensor) -> Tensor:
    """Check table and codes; return the codes as (1 or batch, num_tokens)."""
    batch, heads = query.shape[:2]
    g, tokens = layout.num_global, layout.num_tokens
    _validation.check_tensor(_OP, "bias_table", table, query.device)
    extra = 2 * g + g * g
    if table.dim() != 2 or table.shape[1] != heads:
        raise ValueError(
            f"{_OP}: bias_table must have shape (rows, {heads}), got {tuple(table.shape)}"
        )
    rows = table.shape[0] - extra
    if rows < 1 or rows % 2 == 0:
        raise ValueError(
            f"{_OP}: bias_table must have an odd number of rows and {extra} more for {g} global "
            f"tokens, got {table.shape[0]}"
        )
    shapes = ((tokens,), (1, tokens), (batch, tokens))
    _validation.check_exact(_OP, "position_codes", codes, (torch.int32,), shapes, query.device)
    codes = codes.reshape(-1, tokens).contiguous() if tokens else codes.new_zeros(1, 0)
    if codes.numel() and _validation.readable(codes):
        spread = int((codes.amax(1) - codes.amin(1)).max())
        if spread > (rows - 1) // 2:
            raise ValueError(
                f"{_OP}: position_codes must differ by at most {(rows - 1) // 2} for a bias_table "
                f"of {table.shape[0]} rows, got a difference of {spread}"
            )
    return codes


def _lists_4d(layout: BlockLayout) -> tuple[Tensor, ...]:
    """The layout's lists with both leading dimensions, contiguous."""
    missing = 3 - layout.key_counts.dim()
    lists = (layout.key_counts, layout.key_blocks, layout.query_counts, layout.query_blocks)
    return tuple(x.reshape((1,) * missing + x.shape).contiguous() for x in lists)


def _fake(query: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_global, saliency = args[7], args[-1]
    batch, _, tokens, _ = query.shape
    return empty_attention(query, (batch, tokens - num_global) if saliency else (0,))


def _backward_fake(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    table = args[-4]
    shape = (0,) if table is None else table.shape
    grad_table = query.new_empty(shape, dtype=torch.float32)
    return empty_like_heads(query), empty_like_heads(key), empty_like_heads(value), grad_table


def _layout_of(query: Tensor, args: tuple[Any, ...]) -> BlockLayout:
    block_size, num_global = args[4:6]
    sizes = (query.shape[2] - num_global, block_size, num_global)
    return BlockLayout(*sizes, args[0], args[1], args[2], args[3], trusted=True)


def _cpu(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op from the reference."""
    table, codes, lengths, scale = args[6:10]
    out, lse, saliency = attend(
        query, key, value, _layout_of(query, args), table, codes, lengths, scale, torch.float32
    )
    result = empty_like_heads(query).copy_(out)
    return result, lse.double(), saliency if args[-1] else saliency.new_empty(0)


def _backward_cpu(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *args: Any,
) -> tuple[Tensor, ...]:
    """The op's gradient from the reference."""
    table, codes, lengths, scale = args[6:10]
    layout = _layout_of(query, args)
    *grads, grad_table = attend_backward(
        grad_out, query, key, value, layout, table, codes, lengths, scale
    )
    merged = [empty_like_heads(query).copy_(grad) for grad in grads]
    return *merged, grad_table


_library.define(
    f"{_OP}(Tensor query, Tensor key, Tensor value, {_SHARED}, bool return_saliency)"
    " -> (Tensor out, Tensor lse, Tensor saliency)",
    fake=_fake,
    cpu=_cpu,
    cuda_module=_OP,
)
_library.define(
    f"{_OP}_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor lse, {_SHARED}) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias_table)",
    fake=_backward_fake,
    cpu=_backward_cpu,
    cuda_module=f"{_OP}_backward",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, (block_size, num_global), optional = inputs[:7], inputs[7:9], inputs[9:12]
    ctx.save_for_backward(*tensors, *output[:2], *optional)
    ctx.sizes, ctx.scale = (block_size, num_global), inputs[12]


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, *lists, out, lse, table, codes, lengths = ctx.saved_tensors
    grad_out = _validation.unit_stride(grad_out)
    *grads, grad_table = ops.block_sparse_attention_backward(
        grad_out, query, key, value, out, lse, *lists, *ctx.sizes, table, codes, lengths, ctx.scale
    )
    return *grads, *(None,) * 6, None if table is None else grad_table


_library.differentiate(_OP, _backward, _setup_context)


def _count_flops(query: Tensor, args: tuple[Any, ...]) -> int:
    """4 head_dim FLOP an edge; lists that cannot be read count as full to their width."""
    batch, heads, tokens, head_dim = query.shape
    layout = _layout_of(query, args)
    if _validation.readable(layout.key_counts, any_device=True):
        copies = layout.key_counts.shape[:-1].numel()
        edges = layout.num_edges / copies if copies else 0.0
    else:
        listed = layout.num_tokens * layout.key_blocks.shape[-1] * layout.block_size
        edges = listed + layout.num_global * (tokens + layout.num_tokens)
    return round(4 * batch * heads * head_dim * edges)


_flops.register(_OP, lambda *args: _count_flops(args[0], args[3:]))
_flops.register(f"{_OP}_backward", lambda *args: _count_flops(args[1], args[6:]) * 5 // 2)

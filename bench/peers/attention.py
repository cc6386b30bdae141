"""What block-sparse attention is compared with: dense, gathered, compiled and SViTT's own way."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.measure.harness import Function, Provider, Unavailable
from bench.peers import library
from bench.peers.dense_attention import pair_index
from svitt_ops import BlockLayout


@dataclass(frozen=True, kw_only=True)
class Attention:
    """What is computed: a layout without leading dimensions, and the op's options."""

    layout: BlockLayout
    dtype: torch.dtype
    position_codes: Tensor | None = None
    table_rows: int = 0
    saliency: bool = False


def providers(spec: Attention, device: torch.device) -> list[Provider]:
    """The peers of a device, those that cannot run there included."""
    dense = "dense: every token attends every other, without bias"
    if device.type == "cuda":
        found = [
            Provider(
                name=f"sdpa_{name}",
                oracle="dense",
                note=dense,
                build=lambda backend=backend: _dense(spec, partial(sdpa, backend=backend)),  # type: ignore[misc]
            )
            for name, backend in (
                ("cudnn", SDPBackend.CUDNN_ATTENTION),
                ("flash", SDPBackend.FLASH_ATTENTION),
            )
        ]
        found += [
            Provider(
                name="sdpa_efficient_mask",
                note="dense work under a materialised mask",
                build=lambda: _sdpa_masked(spec, SDPBackend.EFFICIENT_ATTENTION),
            ),
            Provider(
                name="flex_128",
                note="blocks of 128, token mask",
                compiled=True,
                build=lambda: _flex_token_mask(spec),
            ),
            Provider(
                name="flex_padded",
                note="blocks of 56 padded to 64",
                compiled=True,
                build=lambda: _flex_padded(spec, cell=64),
            ),
        ]
    else:
        found = [
            Provider(
                name="sdpa_dense",
                oracle="dense",
                note=dense,
                build=lambda: _dense(spec, sdpa),
            )
        ]
        if spec.position_codes is not None:
            note = "dense work under a materialised float bias"
            found.append(
                Provider(name="sdpa_bias", note=note, build=lambda: _sdpa_masked(spec, None))
            )
        found.append(
            Provider(
                name="flex_attention",
                note="blocks of the layout's size, the global token in one more",
                compiled=True,
                quick=False,
                build=lambda: _flex_padded(spec, cell=spec.layout.block_size),
                backward="FlexAttention has no backward on CPUs",
            )
        )
    found += [
        Provider(
            name=name,
            oracle="dense",
            note=dense,
            build=lambda name=name: _dense(spec, library.attention(name, device)),  # type: ignore[misc]
        )
        for name in library.ATTENTION
    ]
    return [
        *found,
        Provider(
            name="gather_sdpa",
            note="keys and values of each block gathered, then SDPA",
            build=lambda: _gather_sdpa(spec),
        ),
        Provider(
            name="svitt_eager",
            note="the algorithm of SViTT's release, padding masked",
            build=lambda: _svitt_eager(spec),
        ),
    ]


def _with_saliency(spec: Attention, attention: Callable[..., Tensor]) -> Function:
    """Add the softmax row of the first token, which these peers have no other way to return."""

    def function(query: Tensor, key: Tensor, value: Tensor, *table: Tensor) -> tuple[Tensor, ...]:
        out = attention(query, key, value, *table)
        if not spec.saliency:
            return (out,)
        logits = query[:, :, :1].detach().float() @ key.detach().float().mT
        probs = (logits * query.shape[-1] ** -0.5).softmax(-1)
        return out, probs[:, :, 0, spec.layout.num_global :].mean(1)

    return function


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    backend: SDPBackend | None = None,
) -> Tensor:
    """Torch's own attention, by one of its backends if one is named."""
    with nullcontext() if backend is None else sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def compiled(flex: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """FlexAttention, or what calls it, compiled; it warns of nothing."""
    torch._dynamo.config.recompile_limit = 1024  # past it, flex falls back to dense in silence
    made = torch.compile(flex, dynamic=False, fullgraph=True)

    def quiet(*inputs: Tensor, **options: Any) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return made(*inputs, **options)

    return quiet


def _dense(spec: Attention, attention: Callable[..., Tensor]) -> Function:
    """Attention that knows of no bias table."""
    return _with_saliency(spec, lambda query, key, value, *table: attention(query, key, value))


def _sdpa_masked(spec: Attention, backend: SDPBackend | None) -> Function:
    """Dense SDPA under a float mask; with a bias the mask is made from the table at every call."""
    allowed, index = spec.layout.to_dense(), _bias_index(spec)
    ready = torch.zeros(allowed.shape, dtype=spec.dtype, device=allowed.device)
    ready = ready.masked_fill(~allowed, float("-inf"))

    def attention(query: Tensor, key: Tensor, value: Tensor, *table: Tensor) -> Tensor:
        mask = ready
        if index is not None:
            mask = _look_up(table[0], index).to(query.dtype) + ready
        mask = mask.expand(query.shape[0], query.shape[1], *mask.shape[-2:])
        return sdpa(query, key, value, mask, backend)

    return _with_saliency(spec, attention)


def _gather_sdpa(spec: Attention) -> Function:
    """One SDPA over gathered blocks and one for the dense rows of the global tokens."""
    layout, index = spec.layout, _bias_index(spec)
    blocks, valid = _block_lists(layout)
    m, g = layout.num_blocks, layout.num_global
    padded = not bool(valid.all())
    chosen = None if index is None else _gathered_index(layout, index, blocks)

    def gathered(x: Tensor) -> Tensor:
        picked = _cut(x, layout)[:, :, blocks].flatten(3, 4)  # (B, H, M, K G, D)
        first = x[:, :, None, :g].expand(-1, -1, m, -1, -1)
        return torch.cat([first, picked], 3).flatten(1, 2)

    def attention(query: Tensor, key: Tensor, value: Tensor, *table: Tensor) -> Tensor:
        heads = query.shape[1]
        mask: Tensor | None = valid.repeat(heads, 1, 1) if padded else None
        top = None
        if chosen is not None and index is not None:
            bias = _look_up(table[0], chosen).to(query.dtype)  # (H, M, G, g + K G)
            mask = bias.masked_fill(~valid, float("-inf")).flatten(0, 1)
            top = _look_up(table[0], index[:g]).to(query.dtype)
        rows = F.scaled_dot_product_attention(
            _cut(query, layout).flatten(1, 2), gathered(key), gathered(value), attn_mask=mask
        )
        rows = rows.unflatten(1, (heads, m)).flatten(2, 3)[:, :, : layout.num_tokens]
        first = F.scaled_dot_product_attention(query[:, :, :g], key, value, attn_mask=top)
        return torch.cat([first, rows], 2)

    return _with_saliency(spec, attention)


def _svitt_eager(spec: Attention) -> Function:
    """SViTT's release: fp32 score buffers filled slot by slot, values gathered block by block."""
    layout, index = spec.layout, _bias_index(spec)
    blocks, valid = _block_lists(layout)
    m, g, size = layout.num_blocks, layout.num_global, layout.block_size
    chosen = None if index is None else _gathered_index(layout, index, blocks)
    rows_of = blocks.tolist()

    def function(query: Tensor, key: Tensor, value: Tensor, *table: Tensor) -> tuple[Tensor, ...]:
        batch, heads, _, dim = query.shape
        query = query * dim**-0.5
        top = torch.einsum("bhid,bhjd->bhij", query[:, :, :g], key).float()
        if index is not None:
            top = top + _look_up(table[0], index[:g])
        top = top.softmax(-1)
        first = torch.einsum("bhij,bhjd->bhid", top.to(value.dtype), value)
        q, k, v = (_cut(x, layout) for x in (query, key, value))
        shape = (batch, heads, m, size, valid.shape[-1])
        scores = torch.zeros(shape, dtype=torch.float32, device=query.device)
        scores[..., :g] = torch.einsum("bhmid,bhjd->bhmij", q, key[:, :, :g])
        for slot in range(blocks.shape[1]):
            start = g + slot * size
            picked = k[:, :, blocks[:, slot]]
            scores[..., start : start + size] = torch.einsum("bhmid,bhmjd->bhmij", q, picked)
        if chosen is not None:
            scores = scores + _look_up(table[0], chosen)
        probs = scores.masked_fill(~valid, float("-inf")).softmax(-1).to(value.dtype)
        values = torch.stack(
            [torch.cat([value[:, :, :g], v[:, :, row].flatten(2, 3)], 2) for row in rows_of], 2
        )
        rows = torch.einsum("bhmij,bhmjd->bhmid", probs, values).flatten(2, 3)
        out = torch.cat([first, rows[:, :, : layout.num_tokens]], 2)
        return (out, top[:, :, 0, g:].detach().mean(1)) if spec.saliency else (out,)

    return function


def _flex_token_mask(spec: Attention) -> Function:
    """FlexAttention over blocks of 128, which global tokens shift against the layout's."""
    mask = spec.layout.to_block_mask(block_size=128)
    return _flex(spec, mask, lambda x: x, lambda x: x, spec.position_codes, {})


def _flex_padded(spec: Attention, cell: int) -> Function:
    """FlexAttention over the layout's own blocks, each padded to a cell; globals in cell 0."""
    from torch.nn.attention.flex_attention import BlockMask

    layout = spec.layout
    m, g, size = layout.num_blocks, layout.num_global, layout.block_size
    num_tokens = layout.num_tokens
    if not 0 < g <= cell or size > cell:
        raise Unavailable(f"needs 1 to {cell} global tokens and blocks of at most {cell}")
    spare = m * size - num_tokens

    def pad(x: Tensor) -> Tensor:  # (B, H, N, D) -> (B, H, (M + 1) cell, D)
        first = F.pad(x[:, :, :g], (0, 0, 0, cell - g))
        rest = F.pad(x[:, :, g:], (0, 0, 0, spare)).unflatten(2, (m, size))
        return torch.cat([first, F.pad(rest, (0, 0, 0, cell - size)).flatten(2, 3)], 2)

    def cut(x: Tensor) -> Tensor:
        rest = x[:, :, cell:].unflatten(2, (m, cell))[:, :, :, :size].flatten(2, 3)
        return torch.cat([x[:, :, :g], rest[:, :, :num_tokens]], 2)

    def valid(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        block, within = k // cell - 1, k % cell
        token = (within < size) & (block * size + within < num_tokens)
        return torch.where(k < cell, k < g, token)

    device = layout.device
    counts = F.pad(layout.key_counts + 1, (1, 0), value=m + 1)
    numbers = torch.zeros(m + 1, m + 1, dtype=torch.int32, device=device)
    numbers[0] = torch.arange(m + 1, device=device)
    numbers[1:, 1 : 1 + layout.key_blocks.shape[1]] = layout.key_blocks + 1
    length = (m + 1) * cell
    mask = BlockMask.from_kv_blocks(
        counts[None, None],
        numbers[None, None],
        BLOCK_SIZE=cell,
        mask_mod=valid,
        seq_lengths=(length, length),
    )
    codes = None
    if spec.position_codes is not None:
        rest = F.pad(spec.position_codes, (0, spare)).view(m, size)
        codes = F.pad(rest, (0, cell - size)).flatten()
        codes = F.pad(codes, (cell - g, 0))  # as if the globals' cell held g tokens
    options: dict[str, Any] = {}
    if device.type == "cuda":
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
        options = {"kernel_options": dict.fromkeys(names, cell)}
    return _flex(spec, mask, pad, cut, codes, options)


def _flex(
    spec: Attention,
    mask: Any,
    pad: Callable[[Tensor], Tensor],
    cut: Callable[[Tensor], Tensor],
    codes: Tensor | None,
    options: dict[str, Any],
) -> Function:
    """Compiled FlexAttention; `codes` are those of the padded sequence past the global tokens."""
    from torch.nn.attention.flex_attention import flex_attention

    g = spec.layout.num_global
    slots = None if codes is None else F.pad(codes, (g, 0))

    def attention(query: Tensor, key: Tensor, value: Tensor, *table: Tensor) -> Tensor:
        q, k, v = pad(query), pad(key), pad(value)
        change = None if slots is None else _bias_score(table[0], slots, g)
        return cut(flex_attention(q, k, v, score_mod=change, block_mask=mask, **options))

    return _with_saliency(spec, compiled(attention))


def _bias_score(table: Tensor, slots: Tensor, g: int) -> Callable[..., Tensor]:
    rows = table.shape[0] - 2 * g - g * g

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        offset = slots[q] - slots[k] + (rows - 1) // 2
        of_token = torch.where(k < g, rows + g + k, offset)
        of_global = torch.where(k < g, rows + 2 * g + q * g + k, rows + q)
        return score + table[torch.where(q < g, of_global, of_token), h]

    return score_mod


def _cut(x: Tensor, layout: BlockLayout) -> Tensor:
    """Tokens past the globals as (B, H, M, G, D), zeros after the last one."""
    spare = layout.num_blocks * layout.block_size - layout.num_tokens
    rest = x[:, :, layout.num_global :]
    rest = F.pad(rest, (0, 0, 0, spare)) if spare else rest
    return rest.unflatten(2, (layout.num_blocks, layout.block_size))


def _block_lists(layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """Key blocks (M, K), and which of the gathered keys exist, (M, 1, g + K G)."""
    if layout.key_counts.dim() != 1:
        raise Unavailable("written for layouts without leading dimensions")
    blocks = layout.key_blocks.long()
    slot, token = (
        torch.arange(n, device=layout.device) for n in (blocks.shape[1], layout.block_size)
    )
    exists = blocks[..., None] * layout.block_size + token < layout.num_tokens
    exists = exists & (slot < layout.key_counts[:, None])[..., None]
    return blocks, F.pad(exists.flatten(1), (layout.num_global, 0), value=True)[:, None]


def _bias_index(spec: Attention) -> Tensor | None:
    codes = spec.position_codes
    return None if codes is None else pair_index(codes, spec.table_rows, spec.layout.num_global)


def _gathered_index(layout: BlockLayout, index: Tensor, blocks: Tensor) -> Tensor:
    """The rows of `_bias_index` that gathered keys need, (M, G, g + K G)."""
    m, g, size = layout.num_blocks, layout.num_global, layout.block_size
    spare = m * size - layout.num_tokens
    rows = F.pad(index[g:], (0, spare, 0, spare)).unflatten(0, (m, size))
    cells = rows[..., g:].unflatten(2, (m, size))  # (M, G, M, G)
    picked = torch.stack([cells[i][:, row].flatten(1) for i, row in enumerate(blocks)])
    return torch.cat([rows[..., :g], picked], 2)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """The bias of pairs, heads first."""
    return table[index].movedim(-1, 0)

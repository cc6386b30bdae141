"""The attention function and the mask function that are registered with transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function
from transformers.utils.output_capturing import _active_collector

import svitt_ops as so
from svitt_ops.integrations.transformers.bias import (
    PADDING,
    attend_without,
    bias_table,
    has_table,
    split,
)

NAME = "svitt_ops"
DENSE_BLOCK = 128
"""Block size of dense attention, for which it has no meaning: the one the kernels are best at."""
APPLIED = ("position_ids", "position_embeddings", "cache_position")
"""Tensors that models hand on, and that an attention function has nothing to do with."""
REFUSED = (
    "softcap",
    "position_bias",
    "head_mask",
    "layer_head_mask",
    "s_aux",
    "sliding_window",
    "cache",
)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a transformers model by the ops: what ``attn_implementation="svitt_ops"`` calls.

    Args:
        module: the attention layer; `sparsify` leaves there what it is to do.
        query: ``(batch, heads, queries, head_dim)``, fp32, fp16 or bf16, head_dim 8 to 256.
        key: ``(batch, heads, keys, head_dim)``.
        value: like ``key``.
        attention_mask: of `padding_mask`: bool ``(batch or 1, 1, 1, keys)``, True where a key is
            attended; for BEiT its position bias, see `svitt_ops.integrations.transformers.bias`.
        scaling: factor of the logits, ``head_dim ** -0.5`` by default.
        dropout: of attention weights; must be 0.
        is_causal: must not be true, nor may the module's own.
        **kwargs: what the model was called with; what would change the result is refused.

    Returns:
        ``(batch, queries, heads, head_dim)``, and None for the weights.

    Raises:
        TypeError, ValueError: naming what cannot be expressed.
    """
    _check(module, dropout, is_causal, kwargs)
    ignored, bias = _parts(module, query, key, attention_mask)
    rows = getattr(module, "svitt_ops_rows", None)
    sparse = getattr(module, "svitt_ops_sparse", None)
    attend = _dense if sparse is None else sparse.attend
    out, row = attend(module, query, key, value, ignored, bias, scaling, rows is not None)
    if rows is not None:
        rows.append(row)
    return out.transpose(1, 2), None


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """What `attention` takes of a model's ``(batch, keys)`` padding mask.

    Args:
        batch_size: samples.
        q_length: queries.
        kv_length: keys.
        mask_function: transformers' rule of who attends whom; only the bidirectional one.
        attention_mask: bool ``(batch, keys)``, True where a key exists, or None.
        config: of the model.
        **kwargs: how other masks are made.

    Returns:
        bool ``(batch, 1, 1, keys)``, True where a key is attended; for BEiT, which adds its bias
        to it, fp64 and 0 there. None without padding.

    Raises:
        ValueError: for another rule, such as a causal one.
    """
    if mask_function is not bidirectional_mask_function:
        rule = getattr(mask_function, "__qualname__", repr(mask_function)).split(".")[0]
        who = getattr(config, "model_type", "the model")
        raise ValueError(
            f"{NAME}: {who} must attend in both directions, got {rule} (in a model of several "
            'towers, name the one: attn_implementation={"vision_config": "svitt_ops"})'
        )
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch_size, kv_length):
        raise ValueError(
            f"{NAME}: attention_mask must have shape ({batch_size}, {kv_length}), "
            f"got {tuple(attention_mask.shape)}"
        )
    attended = attention_mask.bool()[:, None, None]
    if has_table(config):
        return torch.where(attended, 0.0, PADDING).double()
    return attended


@contextmanager
def saliency(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Within, collects the attention of the first token, without a fall to eager.

    ``with saliency(model) as rows: model(pixel_values)``

    Args:
        model: a model with ``attn_implementation="svitt_ops"``, sparse or not.

    Yields:
        A list, to which each attention appends fp32 ``(batch, tokens)``: the row of the first
        token, softmaxed over all keys, averaged over heads, without gradient. Of a dense model
        for all tokens but the first, of a sparse one for those that are not global.

    Raises:
        ValueError: for a model without attention by svitt_ops.
    """
    rows: list[Tensor] = []
    modules: list[Any] = [
        module
        for module in model.modules()
        if hasattr(module, "is_causal")
        and getattr(getattr(module, "config", None), "_attn_implementation", None) == NAME
    ]
    if not modules:
        raise ValueError(f'saliency: model must have attn_implementation="{NAME}", got none')
    try:
        for module in modules:
            module.svitt_ops_rows = rows
        yield rows
    finally:
        for module in modules:
            del module.svitt_ops_rows


def _dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ignored: Tensor | None,
    bias: Tensor | None,
    scaling: float | None,
    with_row: bool,
) -> tuple[Tensor, Tensor | None]:
    if bias is None and (ignored is not None or query.shape != key.shape):
        which: Literal["cls"] | None = "cls" if with_row else None
        found = so.cross_attention(
            query, key, value, key_padding_mask=ignored, scale=scaling, return_saliency=which
        )
        return (found[0], found[1][:, 1:]) if isinstance(found, tuple) else (found, None)
    tables = {} if bias is None else bias_table(bias, module.config)
    num_global = 1 if with_row or tables else 0
    count = query.shape[2] - num_global
    layout = so.BlockLayout.local_random(  # every block attends every one
        count,
        block_size=DENSE_BLOCK,
        num_local=count,
        num_random=0,
        num_global=num_global,
        device=query.device,
    )
    return attend_without(ignored, query, key, value, layout, scaling, with_row, **tables)


def _cannot(module: nn.Module, words: str) -> ValueError:
    return ValueError(f"{NAME}: {type(module).__name__}: {words}")


def _check(
    module: nn.Module, dropout: float, is_causal: bool | None, kwargs: dict[str, Any]
) -> None:
    """Refuse by name what the ops do not do."""
    if getattr(module, "is_causal", False) if is_causal is None else is_causal:
        raise _cannot(module, "is_causal must be False, got causal attention")
    if dropout:
        raise _cannot(module, f"dropout of attention weights must be 0, got {dropout}")
    collected = _active_collector.get()
    if kwargs.get("output_attentions") or (collected is not None and "attentions" in collected):
        raise _cannot(
            module,
            "output_attentions must be False, got True; the first token's row is collected by "
            "`with svitt_ops.integrations.transformers.saliency(model) as rows`",
        )
    for name, given in kwargs.items():
        if given is not None and (
            name in REFUSED or (isinstance(given, Tensor) and name not in APPLIED)
        ):
            raise _cannot(module, f"{name} must be None, got {type(given).__name__}")


def _parts(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Of a mask: bool ``(batch, keys)``, True where a key is ignored, and the position bias."""
    if mask is None:
        return None, None
    if mask.is_floating_point() and has_table(module.config):
        return split(mask)
    batch, keys = query.shape[0], key.shape[2]
    sparse = getattr(module, "svitt_ops_sparse", None)
    if sparse is not None and sparse.kept is not None:
        keys = mask.shape[-1]  # of all tokens, of which fewer are left
    if mask.dtype != torch.bool or mask.shape not in ((batch, 1, 1, keys), (1, 1, 1, keys)):
        raise _cannot(
            module,
            f"attention_mask must be bool (batch, 1, 1, {keys}), a padding mask, "
            f"got {mask.dtype} of {tuple(mask.shape)}",
        )
    return mask[:, 0, 0].logical_not().expand(batch, keys), None

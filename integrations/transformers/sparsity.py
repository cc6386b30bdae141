"""`sparsify`: block-sparse attention and token pruning in a vision model, by hooks on layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

import svitt_ops as so
from svitt_ops.integrations.transformers.bias import (
    attend_without,
    bias_table,
    grid_of,
    has_table,
)
from svitt_ops.models.parts.token_order import token_order as order_of
from svitt_ops.randomness import seeded

PREFIX_TOKENS = {
    "vit": 1,
    "deit": 2,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "videomae": 0,
    "vivit": 1,
    "beit": 1,
}
"""Tokens before the patches of each kind of model, registers apart."""
LAYER_LISTS = ("layer", "layers")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `sparsify` was asked for: what `config.svitt_ops` holds."""

    block_size: int
    num_local: int
    num_random: int
    num_global: int | None
    keep_rate: float | None
    prune_layers: list[int] | None
    token_order: str | None
    seed: int


class SparseLayer:
    """What one layer of a sparse model is to do, and what it did in the last forward pass.

    Args:
        settings: of the model.
        number: of the layer, from 0.
        layers: of the model.
        num_global: global tokens.
        rank: int64 ``(patches,)``, the place of each patch in the order that blocks are cut from;
            None is the model's own.
    """

    def __init__(
        self,
        settings: Settings,
        number: int,
        layers: int,
        num_global: int,
        rank: Tensor | None,
    ) -> None:
        self.settings, self.num_global, self.rank = settings, num_global, rank
        self.seed = settings.seed * layers + number
        self.prunes = settings.keep_rate is not None and number in (settings.prune_layers or ())
        self.following: SparseLayer | None = None
        self.before = ""
        self.handles: list[RemovableHandle] = []
        self.layout: so.BlockLayout | None = None
        self.row: Tensor | None = None
        self.kept: Tensor | None = None
        """int64 ``(batch, n)``: numbers of the patches that enter the layer; None is all."""

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        ignored: Tensor | None,
        bias: Tensor | None,
        scaling: float | None,
        with_row: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Block-sparse attention, and the first token's row where it is wanted."""
        count, s = query.shape[2] - self.num_global, self.settings
        if with_row and not self.num_global:
            raise ValueError("saliency: the model must have a global token, got num_global 0")
        # Drawn here: under gradient checkpointing a layer runs twice, from one random state.
        self.layout = layout = so.BlockLayout.local_random(
            count,
            block_size=s.block_size,
            num_local=s.num_local,
            num_random=s.num_random,
            num_global=self.num_global,
            generator=None if module.training else seeded(self.seed),
            device=query.device,
        )
        kept, batch = self.kept, query.shape[0]
        if ignored is not None and kept is not None:
            g = self.num_global
            ignored = torch.cat([ignored[:, :g], ignored[:, g:].gather(1, kept)], 1)
        tables = {} if bias is None else bias_table(bias, module.config)
        if tables and kept is not None:
            tables["position_codes"] = tables["position_codes"][kept]
        order = self._order(count, batch, query.device)
        if order is not None:
            if tables:
                codes = tables["position_codes"].expand(batch, -1)
                tables["position_codes"] = codes.gather(1, order)
            first = torch.arange(self.num_global, device=query.device).expand(batch, -1)
            places = torch.cat([first, order + self.num_global], 1)
            query, key, value = (_reordered(x, places) for x in (query, key, value))
            ignored = None if ignored is None else ignored.gather(1, places)
        out, row = attend_without(
            ignored, query, key, value, layout, scaling, with_row or self.prunes, **tables
        )
        if order is not None:
            out = _reordered(out, places.argsort(1))
            row = None if row is None else row.gather(1, order.argsort(1))
        self.row = row
        return out, row

    def start(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the layer: its rotations, if any, for the patches that are left."""
        self.layout = None
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            self._check_checkpointed(args, kwargs)
        rotations = kwargs.get("position_embeddings")
        if self.kept is not None and rotations is not None:
            rotations = tuple(x[self.kept][:, None] for x in rotations)
            kwargs = kwargs | {"position_embeddings": rotations}
        return args, kwargs

    def finish(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the layer: its tokens, without those that are pruned."""
        if self.layout is None:
            raise ValueError(
                f"sparsify: the attention of {type(layer).__name__} must be svitt_ops, got another "
                "attn_implementation; call desparsify first"
            )
        kept = self.kept
        if self.prunes and self.row is not None:
            found = so.prune_tokens(
                output, self.row, keep_rate=self.settings.keep_rate, num_global=self.num_global
            )
            output = found.tokens
            kept = found.indices if kept is None else kept.gather(1, found.indices)
        self.row = None
        if self.following is not None:
            self.following.kept = kept
        return output

    def _order(self, count: int, batch: int, device: torch.device) -> Tensor | None:
        """int64 ``(batch, count)``: the patch that comes p-th; None is the model's own order."""
        if self.rank is None:
            return None
        self.rank = rank = self.rank.to(device)
        if self.kept is not None:
            return rank[self.kept].argsort(1)
        if count != rank.shape[0]:
            raise ValueError(
                f"sparsify: token_order must be None but for the {rank.shape[0]} patches of the "
                f"config's grid, got {count} patches"
            )
        return rank.argsort().expand(batch, -1)

    def _check_checkpointed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What is known of each token must not change until its layer is run again."""
        others = (*args[1:], *kwargs.values())
        per_token = any(isinstance(x, Tensor | tuple) for x in others)
        if self.settings.keep_rate is not None and (per_token or self.rank is not None):
            raise ValueError(
                "sparsify: gradient checkpointing must be off where tokens are pruned that have "
                "positions, masks or an order, got it on"
            )


def sparsify(
    model: PreTrainedModel,
    *,
    block_size: int = 56,
    num_local: int = 1,
    num_random: int = 3,
    num_global: int | None = None,
    keep_rate: float | None = None,
    prune_layers: list[int] | None = None,
    token_order: str | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Make the vision towers of a transformers model sparse, in place.

    Every layer draws its blocks by `svitt_ops.BlockLayout.local_random`: anew on each forward pass
    in training, alike on each in evaluation. After the layers in ``prune_layers`` the tokens that
    the first one attends least leave. Weights and their names stay as they are. The settings are
    in ``config.svitt_ops``, so that ``sparsify(model, **model.config.svitt_ops)`` makes a model
    sparse again that was saved; without that call it opens dense.

    Args:
        model: ViT, DeiT, DINOv2 (with registers), DINOv3, CLIP, SigLIP, VideoMAE, ViViT or BEiT,
            also inside of another model. Of several towers those of vision become sparse.
        block_size: tokens per block, 1 to 256.
        num_local: blocks in the local window.
        num_random: random blocks per query block.
        num_global: tokens at the start that attend all and are attended by all; None is the
            model's own, its [CLS], distillation and register tokens.
        keep_rate: share of the tokens that stay at each pruning, see `svitt_ops.keep_count`.
        prune_layers: numbers of the layers, from 0, that are pruned after; given exactly when
            ``keep_rate`` is, and only for a model with a [CLS] token.
        token_order: "morton" or "hilbert", the curve along which patches are cut into blocks; the
            model sees its tokens in its own order. None is by frame, row and column.
        seed: of the layouts in evaluation.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Source:
        SViTT (CVPR 2023), sections 3.2 and 3.3.
    """
    towers = list(_towers(model))
    kinds = ", ".join(PREFIX_TOKENS)
    if not towers:
        got = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(f"sparsify: model must have a tower of {kinds}, got {got}")
    if list(_sparse(model)):
        raise ValueError("sparsify: model must be dense, got a sparse one; desparsify it first")
    settings = Settings(
        block_size=block_size,
        num_local=num_local,
        num_random=num_random,
        num_global=num_global,
        keep_rate=keep_rate,
        prune_layers=None if prune_layers is None else list(prune_layers),
        token_order=token_order,
        seed=seed,
    )
    plans = [_plan(settings, tower.config, len(layers)) for tower, layers in towers]
    for (tower, layers), plan in zip(towers, plans, strict=True):
        for layer, sparse, following in zip(layers, plan, [*plan[1:], None], strict=True):
            sparse.following, sparse.before = following, tower.config._attn_implementation
            sparse.handles = [
                layer.register_forward_pre_hook(sparse.start, with_kwargs=True),
                layer.register_forward_hook(sparse.finish),
            ]
            _attention_of(layer).svitt_ops_sparse = sparse  # type: ignore[assignment]
    for tower, _ in towers:
        tower.set_attn_implementation("svitt_ops")
    model.config.svitt_ops = asdict(settings)
    return model


def desparsify(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `sparsify`, in place: dense attention as before it.

    Args:
        model: a sparse model.

    Returns:
        The model.

    Raises:
        ValueError: for a model that is not sparse.
    """
    _check_sparse("desparsify", model)
    for tower, layers in _towers(model):
        for layer in layers:
            module = _attention_of(layer)
            sparse: Any = module.svitt_ops_sparse
            for handle in sparse.handles:
                handle.remove()
            del module.svitt_ops_sparse
        tower.set_attn_implementation(sparse.before)
    del model.config.svitt_ops
    return model


def layouts(model: PreTrainedModel) -> list[so.BlockLayout]:
    """The layouts of the last forward pass, of each layer in turn.

    Args:
        model: a sparse model.

    Returns:
        One layout a layer; after a pruning, over the tokens that were left, in ``token_order``.

    Raises:
        ValueError: for a model that is not sparse, or has not run.
    """
    _check_sparse("layouts", model)
    found = [sparse.layout for sparse in _sparse(model)]
    if any(layout is None for layout in found):
        raise ValueError("layouts: model must have run, got no forward pass")
    return [layout for layout in found if layout is not None]


def _plan(settings: Settings, config: Any, layers: int) -> list[SparseLayer]:
    """What each layer of a tower is to do; refuses what cannot be."""
    s, op = settings, "sparsify"
    prefix = PREFIX_TOKENS[config.model_type] + getattr(config, "num_register_tokens", 0)
    num_global = prefix if s.num_global is None else s.num_global
    so.BlockLayout.local_random(  # checks the sizes
        1,
        block_size=s.block_size,
        num_local=s.num_local,
        num_random=s.num_random,
        num_global=num_global,
    )
    if isinstance(s.seed, bool) or not isinstance(s.seed, int) or s.seed < 0:
        raise ValueError(f"{op}: seed must be an int of at least 0, got {s.seed!r}")
    if (s.keep_rate is None) != (s.prune_layers is None):
        raise ValueError(
            f"{op}: keep_rate and prune_layers must be given together, "
            f"got {s.keep_rate} and {s.prune_layers}"
        )
    if s.keep_rate is not None and s.prune_layers is not None:
        so.keep_count(s.keep_rate, 1)  # checks the rate
        if not s.prune_layers or not set(s.prune_layers) <= set(range(layers)):
            raise ValueError(
                f"{op}: prune_layers must be numbers of layers, 0 to {layers - 1}, "
                f"got {s.prune_layers}"
            )
        if prefix == 0:
            raise ValueError(
                f"{op}: keep_rate must be None for {config.model_type}, which has no [CLS] token "
                f"whose attention says what to keep, got {s.keep_rate}"
            )
    by_place = {
        "keep_rate": s.keep_rate is not None,
        "token_order": s.token_order is not None,
        "a relative position bias": has_table(config),
    }
    for name in (name for name, given in by_place.items() if given and num_global != prefix):
        raise ValueError(
            f"{op}: num_global must be {prefix} for {config.model_type} with {name}, "
            f"got {num_global}"
        )
    rank = None
    if s.token_order is not None:
        rank = order_of(s.token_order, grid_of(config)).argsort()
    return [SparseLayer(s, number, layers, num_global, rank) for number in range(layers)]


def _towers(model: nn.Module) -> Iterator[tuple[PreTrainedModel, nn.ModuleList]]:
    """Vision towers with their layers, each once."""
    seen: set[int] = set()
    for tower in model.modules():
        kind = getattr(getattr(tower, "config", None), "model_type", None)
        if not isinstance(tower, PreTrainedModel) or kind not in PREFIX_TOKENS:
            continue
        for name, layers in tower.named_modules():
            last = name.rpartition(".")[2]
            if last in LAYER_LISTS and isinstance(layers, nn.ModuleList) and id(layers) not in seen:
                seen.add(id(layers))
                yield tower, layers


def _attention_of(layer: nn.Module) -> nn.Module:
    """The module of a layer that calls the attention function."""
    return next(module for module in layer.modules() if hasattr(module, "is_causal"))


def _sparse(model: nn.Module) -> Iterator[SparseLayer]:
    for module in model.modules():
        sparse = getattr(module, "svitt_ops_sparse", None)
        if sparse is not None:
            yield sparse


def _check_sparse(op: str, model: nn.Module) -> None:
    if next(_sparse(model), None) is None:
        raise ValueError(f"{op}: model must be sparse, got one that sparsify was not called on")


def _reordered(x: Tensor, places: Tensor) -> Tensor:
    """Tokens of ``x (batch, heads, tokens, head_dim)`` at int64 ``(batch, tokens)`` places."""
    batch, tokens = places.shape
    rows = places + torch.arange(batch, device=x.device)[:, None] * tokens
    flat = x.transpose(1, 2).flatten(0, 1)
    return flat.index_select(0, rows.flatten()).unflatten(0, (batch, tokens)).transpose(1, 2)

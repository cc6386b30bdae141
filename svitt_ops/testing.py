"""What tests and benchmarks of the ops share: an error budget, poisoned memory, other backends.

The budget compares three computations on the same quantised inputs: the oracle in fp64, the
straightforward one with every step in the inputs' dtype, and the one under test.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from svitt_ops import block_sparse_attention as _op
from svitt_ops import cross_attention as _cross_attention
from svitt_ops.layout import BlockLayout
from svitt_ops.reference.block_sparse_attention import attend
from svitt_ops.reference.cross_attention import Saliency
from svitt_ops.reference.cross_attention import attend as _cross_attend

Backend = Literal["cpp", "reference", "triton", "cuda"]

FLOOR_ULPS = 4
"""Rounding errors of the result's largest element that are always allowed."""


def assert_within_budget(
    actual: Tensor,
    baseline: Tensor,
    oracle: Tensor,
    name: str,
    dtype: torch.dtype | None = None,
    terms: float = 0.0,
) -> None:
    """Check that a result errs at most twice as much as the straightforward computation.

    The budget is ``2 max|baseline - oracle| + 4 eps max|oracle|``, eps of ``dtype``: the floor is a
    few roundings of the largest element, for where the baseline happens to be exact. Where a result
    is a difference of larger terms, a few fp32 roundings of those come on top, ``4 eps32 terms``.

    Args:
        actual: the result under test.
        baseline: the straightforward computation, every step in the inputs' dtype.
        oracle: the computation in fp64 on the same inputs.
        name: what to call the result in the message.
        dtype: of the inputs; ``actual``'s if not given.
        terms: magnitude of the fp32 terms whose difference the result is.

    Raises:
        AssertionError: with the errors of both and the budget.
    """
    assert actual.shape == oracle.shape, f"{name}: shape {actual.shape}, expected {oracle.shape}"
    if not oracle.numel():
        return
    assert bool(actual.isfinite().all()), f"{name}: not finite"
    error = (actual.double() - oracle).abs().max().item()
    straightforward = (baseline.double() - oracle).abs().nan_to_num(posinf=0.0).max().item()
    floor = FLOOR_ULPS * torch.finfo(dtype or actual.dtype).eps * oracle.abs().max().item()
    floor += FLOOR_ULPS * torch.finfo(torch.float32).eps * terms
    budget = 2 * straightforward + floor
    assert error <= budget, (
        f"{name}: error {error:.3g} exceeds {budget:.3g} = 2 x {straightforward:.3g} of the "
        f"straightforward computation + {floor:.3g}"
    )


def contrast_terms(temperature: float, rows: int) -> dict[str, float]:
    """`terms` of a contrastive loss of unit rows and of its gradients, by name.

    Subtracted are the logits of the loss and the weighted rows of the gradients. A weight p moves
    by p (1 - p) times what its logit is off.
    """
    scale = 1 / temperature
    moved = max(1.0, scale / 4)
    of_rows = moved * scale / rows
    return {
        "loss": scale,
        "grad_query": of_rows,
        "grad_key": of_rows,
        "grad_temperature": moved * scale * scale,
    }


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Check for equal bits; on a GPU for fp32 rounding, where other strides are other machine code
    and sums of another order.
    """
    tolerance = 4 * torch.finfo(torch.float32).eps if actual.is_cuda else 0.0
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=0.0)


def attention_results(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    grad_out: Tensor,
    *,
    compute: torch.dtype | None = None,
    bias_table: Tensor | None = None,
    position_codes: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
) -> dict[str, Tensor]:
    """Output, saliency and all gradients of block-sparse attention.

    Args:
        query: as for the op, like the next three.
        key: keys.
        value: values.
        layout: the pattern.
        grad_out: upstream gradient.
        compute: None for the op itself, else the reference with every step in this dtype.
        bias_table: as for the op, like the rest.
        position_codes: codes of the bias.
        key_lengths: existing tokens.
        scale: of the logits.

    Returns:
        ``out``, ``saliency`` (with global tokens), ``grad_query``, ``grad_key``, ``grad_value`` and
        ``grad_bias_table`` (with a table), in the dtype that each was computed in.
    """
    q, k, v = (_leaf(x, compute) for x in (query, key, value))
    leaves = {"grad_query": q, "grad_key": k, "grad_value": v}
    table = None
    if bias_table is not None:
        wide = None if compute is None else torch.promote_types(compute, torch.float32)
        table = leaves["grad_bias_table"] = _leaf(bias_table, wide)
    saliency = None
    if compute is None:
        result = _op(
            q, k, v, layout, bias_table=table, position_codes=position_codes,
            key_lengths=key_lengths, scale=scale, return_saliency=layout.num_global > 0,
        )  # fmt: skip
        out, saliency = result if isinstance(result, tuple) else (result, None)
    else:
        out, _, row = attend(q, k, v, layout, table, position_codes, key_lengths, scale, compute)
        saliency = row if layout.num_global > 0 else None
    found = {"out": out.detach()} | ({} if saliency is None else {"saliency": saliency.detach()})
    return found | _gradients(out, leaves, grad_out)


def cross_attention_results(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    *,
    compute: torch.dtype | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    return_saliency: Saliency = "cls",
) -> dict[str, Tensor]:
    """Output, saliency and all gradients of cross-attention.

    Args:
        query: as for the op, like the next two.
        key: keys.
        value: values.
        grad_out: upstream gradient.
        compute: None for the op itself, else the reference with every step in this dtype.
        key_padding_mask: as for the op, like the rest.
        scale: of the logits.
        return_saliency: which one.

    Returns:
        ``out``, ``saliency``, ``grad_query``, ``grad_key`` and ``grad_value``, in the dtype that
        each was computed in.
    """
    q, k, v = (_leaf(x, compute) for x in (query, key, value))
    if compute is None:
        options: Any = {"key_padding_mask": key_padding_mask, "scale": scale}
        out, saliency = _cross_attention(q, k, v, return_saliency=return_saliency, **options)
    else:
        out, _, saliency = _cross_attend(q, k, v, key_padding_mask, scale, return_saliency, compute)
    leaves = {"grad_query": q, "grad_key": k, "grad_value": v}
    found = {"out": out.detach(), "saliency": saliency.detach()}
    return found | _gradients(out, leaves, grad_out)


def _leaf(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return (x.detach() if dtype is None else x.detach().to(dtype)).requires_grad_()


def _gradients(out: Tensor, leaves: dict[str, Tensor], grad_out: Tensor) -> dict[str, Tensor]:
    """The gradient of each leaf, zero where it has none."""
    grads: Sequence[Tensor | None] = torch.autograd.grad(
        out, list(leaves.values()), grad_out.to(out.dtype), allow_unused=True
    )
    found = {}
    for (name, x), grad in zip(leaves.items(), grads, strict=True):
        found[name] = torch.zeros_like(x) if grad is None else grad
    return found


@contextmanager
def poisoned() -> Iterator[None]:
    """Within, memory that torch allocates uninitialised is full of NaN, in kernels too."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@contextmanager
def route_to(backend: Backend) -> Iterator[None]:
    """Within, ops on CPU tensors run another implementation.

    ``"triton"`` is the Triton launchers, which need ``TRITON_INTERPRET=1`` since before triton was
    imported; ``"reference"`` is plain PyTorch; ``"cpp"`` and ``"cuda"`` change nothing.
    """
    if backend in ("cpp", "cuda"):
        yield
        return
    from svitt_ops import _library

    # Registering over a kernel is the point here, and torch warns of it.
    with (
        torch.library._scoped_library(_library.NAMESPACE, "IMPL") as library,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name, (cpu, module) in _library.implementations.items():
            function = _launcher(name, module) if backend == "triton" else cpu
            library.impl(name, function, "CPU", allow_override=True)
        yield


def _launcher(name: str, module: str) -> Callable[..., Any]:
    """A Triton launcher, imported when it is called: a test needs its own op alone."""

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"svitt_ops.kernels.{module}"), name)(*args)

    return launch

"""The torch dispatcher's side of every op: schema, CPU fallback, CUDA launcher, fake.

The dispatcher is the only backend switch. Schemas live here, in Python; the compiled CPU extension
adds its kernels to the CPU key when it is loaded, and the CUDA key imports Triton on first use.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from svitt_ops import _extension
from svitt_ops._ops import add_op_namespace_prefix, ops

NAMESPACE = ops.name
_library = torch.library.Library(NAMESPACE, "DEF")
_library.define("cpu_capability() -> str")
_warned = False

implementations: dict[str, tuple[Callable[..., Any], str]] = {}
"""Of each op: the plain-PyTorch function, and the module of the launcher of the same name."""
cuda_kernels: set[str] = set()
"""Ops that the CUDA extension implements too, each under its name with ``_cuda`` added."""


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    cpu: Callable[..., Any],
    cuda_module: str,
    compiled: bool = True,
    cuda_kernel: bool = False,
) -> None:
    """Define one op.

    Args:
        schema: torch schema without the namespace; its name is also the Triton launcher's.
        fake: shapes, strides and dtypes of the results.
        cpu: plain-PyTorch implementation, for the CPU key where nothing was compiled.
        cuda_module: module of ``svitt_ops.kernels`` that holds the launcher of the same name.
        compiled: whether the CPU extension has a kernel for this op.
        cuda_kernel: whether the CUDA extension has one, for the op ``<name>_cuda``. The op itself
            stays with Triton until a committed result shows that the other is faster.
    """
    name = schema.partition("(")[0]
    implementations[name] = (cpu, cuda_module)
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(add_op_namespace_prefix(name), fake, lib=_library)
    _register_vmap(name)

    def launch(*args: Any) -> Any:
        module = importlib.import_module(f"svitt_ops.kernels.{cuda_module}")
        return getattr(module, name)(*args)

    def fall_back(*args: Any) -> Any:
        _warn_once()
        return cpu(*args)

    _library.impl(name, launch, "CUDA")
    if not compiled:
        _library.impl(name, cpu, "CPU")
    elif not _extension.load_cpu():
        _library.impl(name, fall_back, "CPU")
    if cuda_kernel:
        cuda_kernels.add(name)
        _library.define(schema.replace("(", "_cuda(", 1), tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(add_op_namespace_prefix(f"{name}_cuda"), fake, lib=_library)


def define_random(schema: str, *, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an op without tensors among its arguments, which runs alike for all devices."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(add_op_namespace_prefix(name), fake, lib=_library)


def cuda_kernel(name: str) -> Callable[..., Any]:
    """The op ``<name>_cuda`` with the kernel of the CUDA extension, which it loads."""
    if not _extension.load_cuda():
        raise RuntimeError(f"{name}_cuda: no CUDA extension: {_extension.cuda_reason()}")
    return getattr(ops, f"{name}_cuda")


def _warn_once() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "svitt_ops: the compiled CPU extension is missing, CPU ops run the slow plain-PyTorch "
            f"reference ({_extension.status().cpu_reason}); see `svitt info`",
            RuntimeWarning,
            stacklevel=3,
        )


def differentiate(
    name: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., Any],
    prepare: Callable[[tuple[Any, ...]], tuple[Any, ...]] = lambda args: args,
) -> None:
    """Attach autograd: the gradient is the op ``<name>_backward``, itself not derivable.

    Like `torch.library.register_autograd`, which adds three times as much to each call: small
    batches are bound by it. Forward mode and second derivatives raise an error that says so.

    Args:
        name: of the op, of whose outputs the first has a gradient.
        backward: of the context and that gradient, to those of the first arguments.
        setup_context: of the context, the arguments and the outputs; saves what is needed.
        prepare: what the op's arguments become where a gradient will be wanted.
    """

    def set_up(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, outputs)

    def go_back(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        found = () if grad is None else backward(ctx, grad)
        return *found, *(None,) * (len(ctx.needs_input_grad) - 1 - len(found))

    def refuse(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(
            f"{name}: a second derivative is not available, there is no double backward"
        )

    def keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None: ...

    _register_autograd(name, name, go_back, set_up, prepare)
    _register_autograd(f"{name}_backward", name, refuse, keep_nothing, lambda args: args)


def _register_autograd(
    name: str,
    public_name: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., Any],
    prepare: Callable[[tuple[Any, ...]], tuple[Any, ...]],
) -> None:
    op = getattr(ops, name).default

    def run(keys: Any, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *args)

    def forward(ctx: Any, keys: Any, *args: Any) -> Any:
        if any(x.is_inference() for x in args if isinstance(x, Tensor)):
            # They cannot be saved. A layout or ids from inference mode may be trained with.
            args = tuple(
                x.clone() if isinstance(x, Tensor) and x.is_inference() else x for x in args
            )
        args = prepare(args)
        if torch._C._are_functorch_transforms_active():
            # A Function switches both modes off, and the transforms outside of this one need them.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                output = run(keys, args)
        else:
            output = run(keys, args)
        setup_context(ctx, args, output)
        return output

    # Tried: the backward below the autograd keys too; 4 us less, but compiled autograd warns of it.
    def backward_of_all(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return None, *backward(ctx, *grads)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_of_all)}
    function: Any = type(name, (torch.autograd.Function,), methods)  # profilers show its name
    # Past Function.apply, which is for what stands above the dispatcher: here a transform of
    # torch.func has already taken its own level apart.
    apply = super(torch.autograd.Function, function).apply

    def autograd(keys: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            refuse_tangents(public_name, args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            if torch._C._are_functorch_transforms_active():
                with enable_single_level_autograd_function():
                    return apply(keys, *args)
            return apply(keys, *args)
        return run(keys, args)

    _library.impl(name, autograd, "Autograd", with_keyset=True)


def refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """Without a rule of its own an op would drop tangents, which reads as a derivative of 0."""
    for x in args:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(f"{name}: a forward-mode derivative (jvp) is not available")


def _register_vmap(name: str) -> None:
    """One call of the op for each sample of `torch.vmap`, which puts the results together."""
    op = getattr(ops, name).default

    def loop(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        if not info.batch_size:
            raise NotImplementedError(f"{name}: vmap over no samples is not available")
        # Contiguous, since a sample's strides must be what the op's arguments may have.
        moved = [
            x if dim is None else x.movedim(dim, 0).contiguous()
            for x, dim in zip(args, in_dims, strict=True)
        ]
        found = [
            op(*(x if dim is None else x[i] for x, dim in zip(moved, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(found[0], Tensor):
            return torch.stack(found), 0
        return tuple(torch.stack(x) for x in zip(*found, strict=True)), (0,) * len(found[0])

    torch.library.register_vmap(add_op_namespace_prefix(name), loop, lib=_library)


def empty_like_heads(x: Tensor) -> Tensor:
    """An empty (batch, heads, tokens, head_dim) tensor whose heads merge without a copy."""
    batch, heads, tokens, head_dim = x.shape
    return x.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


def empty_attention(query: Tensor, saliency: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Empty output, log-sum-exp and saliency of an attention op, of this shape."""
    # On a CPU the extra digits are free, and weights near 1 need them where logits are large.
    wide = torch.float64 if query.device.type == "cpu" else torch.float32
    lse = query.new_empty(query.shape[:3], dtype=wide)
    return empty_like_heads(query), lse, query.new_empty(saliency, dtype=torch.float32)

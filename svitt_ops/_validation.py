"""Checks that ops share: each error names the op, the argument, what it must be and what it was."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor

from svitt_ops.randomness import SeededGenerator

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_BLOCK_SIZE = 256
_INTS = (int, torch.SymInt)
_FLOATS: tuple[type, ...] = (float, torch.SymFloat, *_INTS)
_NO_NUMBERS = (bool, Tensor)
_INT64 = 2**63
_STRIDED = torch.strided


def check_int(op: str, name: str, value: Any) -> int:
    """``value`` as an int: numpy's count, bools and tensors do not, a symbolic one stays."""
    if not isinstance(value, _INTS) or isinstance(value, bool):
        try:
            number = None if isinstance(value, _NO_NUMBERS) else operator.index(value)
        except TypeError:
            number = None
        if number is None:
            raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
        value = number
    if not -_INT64 <= value < _INT64:
        raise ValueError(f"{op}: {name} must fit into 64 bits")
    return value


def check_count(op: str, name: str, value: Any, least: int = 0) -> int:
    """An int of at least ``least``."""
    value = check_int(op, name, value)
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")
    return value


def check_grid(op: str, name: str, shape: Any) -> tuple[int, int, int]:
    """Frames, rows and columns, each at least 1."""
    wanted = f"{op}: {name} must be 3 positive ints"
    try:
        found = None if isinstance(shape, str | Tensor) else tuple(shape)
    except TypeError:
        found = None
    if found is None:
        raise TypeError(f"{wanted}, got {type(shape).__name__}")
    sizes = tuple(check_int(op, f"every size of {name}", size) for size in found)
    if len(sizes) != 3 or any(size < 1 for size in sizes):
        raise ValueError(f"{wanted}, got {sizes}")
    return sizes[0], sizes[1], sizes[2]


def check_sizes(op: str, num_tokens: Any, block_size: Any, num_global: Any) -> tuple[int, int, int]:
    """Of a layout: the three as ints."""
    num_tokens = check_count(op, "num_tokens", num_tokens)
    num_global = check_count(op, "num_global", num_global)
    block_size = check_count(op, "block_size", block_size, least=1)
    if block_size > MAX_BLOCK_SIZE:
        raise ValueError(f"{op}: block_size must be 1 to {MAX_BLOCK_SIZE}, got {block_size}")
    return num_tokens, block_size, num_global


def check_float(op: str, name: str, value: Any, what: str = "a float") -> float:
    """``value`` as a float: numpy's and ints count, bools and tensors do not."""
    if type(value) is int:
        return float(check_int(op, name, value))
    if isinstance(value, _FLOATS) and not isinstance(value, bool):
        return cast(float, value)
    if not isinstance(value, _NO_NUMBERS) and isinstance(value, numbers.Real):
        # A narrow float stands for the decimal that it prints as: numpy.float32(0.55) for 0.55.
        return float(str(value) if hasattr(value, "dtype") else value)
    raise TypeError(f"{op}: {name} must be {what}, got {type(value).__name__}")


def check_scale(op: str, scale: Any) -> float:
    """The factor of an attention's logits."""
    scale = check_float(op, "scale", scale)
    if not torch.compiler.is_compiling() and not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be finite, got {scale}")
    return scale


def check_flag(op: str, name: str, value: Any) -> bool:
    """A bool, or numpy's."""
    if isinstance(value, bool):
        return value
    if type(value).__module__ == "numpy" and type(value).__name__.startswith("bool"):
        return bool(value)
    raise TypeError(f"{op}: {name} must be a bool, got {type(value).__name__}")


def check_device(op: str, device: Any) -> torch.device | None:
    """A device or its name; None stays."""
    if device is None or isinstance(device, torch.device):
        return device
    wanted = f"{op}: device must be a torch.device or its name"
    if not isinstance(device, str | int) or isinstance(device, bool):
        raise TypeError(f"{wanted}, got {type(device).__name__}")
    try:
        return torch.device(device)
    except (RuntimeError, ValueError):
        raise ValueError(f"{wanted}, got {device!r}") from None


def check_dtype(op: str, dtype: Any) -> None:
    """What parameters can have: a floating dtype, or None."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"{op}: dtype must be a floating torch.dtype, got {dtype!r:.60}")


def check_generator(op: str, generator: Any) -> None:
    """A generator or None."""
    if generator is not None and not isinstance(generator, torch.Generator | SeededGenerator):
        raise TypeError(
            f"{op}: generator must be a torch.Generator or None, got {type(generator).__name__}"
        )


def check_dense(op: str, name: str, x: Any, what: str = "a tensor") -> None:
    """A tensor that is neither sparse nor nested nor in a library's own format."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be {what}, got {type(x).__name__}")
    if x.layout is not _STRIDED or x.is_nested:
        kind = "nested" if x.is_nested else str(x.layout)
        raise TypeError(f"{op}: {name} must be dense (torch.strided), got a {kind} tensor")


def check_tensor(op: str, name: str, x: Tensor, device: torch.device | None = None) -> None:
    """A floating tensor of a dtype that the kernels take, on ``device``."""
    check_dense(op, name, x)
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float32, float16 or bfloat16, got {x.dtype}")
    if device is not None and x.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {x.device}")


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """What autocast makes of an op's tensors, by the first one's device; the rest as it is."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    # "meta", for one, has no autocast to ask for.
    if device not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device):
        return tensors
    if not torch.is_autocast_enabled(device):
        return tensors
    cast = torch.get_autocast_dtype(device)
    return tuple(x.to(cast) if isinstance(x, Tensor) else x for x in tensors)


def check_qkv(
    op: str, query: Tensor, key: Tensor, value: Tensor, *, own_keys: bool = False
) -> None:
    """Attention's operands: one shape, dtype and device, contiguous last dimension.

    With ``own_keys`` key and value may have another number of tokens than query, both the same.
    """
    check_tensor(op, "query", query)
    if query.dim() != 4:
        raise ValueError(
            f"{op}: query must have shape (batch, heads, tokens, head_dim), "
            f"got {tuple(query.shape)}"
        )
    if not 8 <= query.shape[-1] <= 256:
        raise ValueError(f"{op}: head_dim must be 8 to 256, got {query.shape[-1]}")
    if own_keys:
        check_tensor(op, "key", key, query.device)
        batch, heads, _, head_dim = query.shape
        if key.dim() != 4 or (*key.shape[:2], key.shape[3]) != (batch, heads, head_dim):
            raise ValueError(
                f"{op}: key must have shape ({batch}, {heads}, keys, {head_dim}), "
                f"got {tuple(key.shape)}"
            )
    shape = key.shape if own_keys else query.shape
    for name, x in (("key", key), ("value", value)):
        check_tensor(op, name, x, query.device)
        if x.shape != shape:
            raise ValueError(f"{op}: {name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
        if x.dtype != query.dtype:
            raise TypeError(f"{op}: {name} must be {query.dtype} as query is, got {x.dtype}")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.stride(-1) != 1:
            raise ValueError(
                f"{op}: {name} must have a contiguous last dimension, got strides {x.stride()}"
            )


def _equal(a: Iterable[int], b: Iterable[int]) -> bool:
    return all(x == y for x, y in zip(a, b, strict=True))


def check_exact(
    op: str,
    name: str,
    x: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shapes: tuple[tuple[int, ...], ...],
    device: torch.device,
) -> None:
    """A tensor of one of these dtypes and shapes, on ``device``."""
    check_dense(op, name, x)
    if x.dtype not in dtypes:
        wanted = " or ".join(str(dtype)[6:] for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be {wanted}, got {x.dtype}")
    # Symbolic sizes are compared one by one: torch.compile misjudges tuples of them.
    if not any(len(shape) == x.dim() and _equal(shape, x.shape) for shape in shapes):
        wanted = " or ".join(str(shape) for shape in dict.fromkeys(shapes))
        raise ValueError(f"{op}: {name} must have shape {wanted}, got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {x.device}")


def check_both(op: str, name: str, x: Any, other_name: str, other: Any) -> None:
    """Both of two arguments, or neither."""
    if (x is None) != (other is None):
        missing, given = (name, other_name) if x is None else (other_name, name)
        raise ValueError(f"{op}: {missing} must be given when {given} is, got None")


def unit_stride(x: Tensor) -> Tensor:
    """The same values with a last stride of 1, copied only where they have another."""
    return x if x.stride(-1) == 1 else x.contiguous()


def readable(x: Tensor, any_device: bool = False) -> bool:
    """Whether values can be looked at: a real tensor, not traced, on the CPU unless ``any_device``.

    Reading a device tensor would make the host wait, so kernels clamp what is not checked here.
    """
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    if x.device.type != "cpu" and not (any_device and x.device.type != "meta"):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def check_range(op: str, name: str, x: Tensor, low: int, high: int) -> None:
    """Every value in ``low`` to ``high``, where the values can be read without waiting."""
    if x.numel() and readable(x):
        least, most = int(x.min()), int(x.max())
        if least < low or most > high:
            raise ValueError(f"{op}: {name} must be {low} to {high}, got {least} to {most}")


def check_embeddings(
    op: str, name: str, x: Tensor, like: Tensor | None = None, *, paired: bool = False
) -> None:
    """A matrix ``(rows, D)``, of the dtype and D of ``like``; if paired, of as many rows."""
    check_tensor(op, name, x, None if like is None else like.device)
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"{op}: {name} must have shape (rows, D), got {tuple(x.shape)}")
    if like is not None and x.dtype != like.dtype:
        raise TypeError(f"{op}: {name} must be {like.dtype} as query is, got {x.dtype}")
    if like is not None and x.shape[1] != like.shape[1]:
        raise ValueError(
            f"{op}: {name} must have {like.shape[1]} columns as query has, got {tuple(x.shape)}"
        )
    if paired and like is not None and x.shape != like.shape:
        raise ValueError(f"{op}: {name} must have shape {tuple(like.shape)}, got {tuple(x.shape)}")


def check_rows(op: str, name: str, x: Tensor) -> None:
    """Not an empty matrix."""
    if x.shape[0] == 0:
        raise ValueError(f"{op}: {name} must have at least one row, got {tuple(x.shape)}")


def check_temperature(op: str, temperature: float | Tensor, like: Tensor) -> Tensor:
    """The temperature as a fp32 scalar on the device of ``like``; a tensor is not read."""
    return _scalar(op, "temperature", temperature, like, "positive and finite", lambda x: x > 0)


def check_bias(op: str, bias: float | Tensor, like: Tensor) -> Tensor:
    """The bias of logits, likewise."""
    return _scalar(op, "bias", bias, like, "finite", lambda _: True)


def _scalar(
    op: str,
    name: str,
    value: float | Tensor,
    like: Tensor,
    wanted: str,
    accepts: Callable[[float], bool],
) -> Tensor:
    if isinstance(value, Tensor):
        check_dense(op, name, value)
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"{op}: {name} must be a float or a floating tensor of one element, "
                f"got {value.dtype} of shape {tuple(value.shape)}"
            )
        if value.device != like.device:
            raise ValueError(f"{op}: {name} must be on {like.device}, got {value.device}")
        scalar = value.float()
        return scalar if scalar.dim() == 0 else scalar.reshape(())  # a node less to go back through
    value = check_float(op, name, value, "a float or a tensor")
    if not torch.compiler.is_compiling() and not (accepts(value) and math.isfinite(value)):
        raise ValueError(f"{op}: {name} must be {wanted}, got {value}")
    return like.new_full((), value, dtype=torch.float32)


def check_weights(op: str, name: str, weights: Tensor, rows: int, device: torch.device) -> Tensor:
    """Weights ``(rows,)``, as contiguous fp32; their values, where these can be read."""
    check_exact(op, name, weights, DTYPES, ((rows,),), device)
    if readable(weights):
        refused = weights[~((weights >= 0) & weights.isfinite())]
        if refused.numel():
            raise ValueError(f"{op}: {name} must be at least 0 and finite, got {refused[0]:g}")
    return weights.detach().float().contiguous()


def check_ids(op: str, name: str, ids: Tensor, rows: int, device: torch.device) -> Tensor:
    """Integer ids ``(rows,)``, as contiguous int64."""
    check_exact(op, name, ids, (torch.int64, torch.int32), ((rows,),), device)
    return ids.long().contiguous()

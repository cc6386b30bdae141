"""Tables that `svitt tune` wrote: tiles that were faster on a GPU than those of `tiles`.

An architecture has one table in use, a JSON file that is read once: the one that SVITT_TILES names
(empty: none), else the user's (`user_file`), else one that comes with the package (`SHIPPED`). A
file that cannot be used is refused as a whole, by an error where SVITT_TILES names it, else by a
warning. Without a table the functions of `tiles` stand. Imports neither torch nor triton.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

SCHEMA = 1
SHIPPED = Path(__file__).parent / "tuned"

Pass = Literal["forward", "grad_query", "grad_key"]
CrossPass = Literal["forward", "saliency", "grad", "grad_key"]
ContrastPass = Literal[
    "forward",
    "forward_ids",
    "backward",
    "backward_ids",
    "sigmoid_forward",
    "sigmoid_forward_ids",
    "sigmoid_backward",
    "sigmoid_backward_ids",
    "ranks",
    "sample",
    "queue",
    "taught_queue",
    "combine",
]


@dataclass(frozen=True, kw_only=True)
class Form:
    """What the entries of a kernel table are made of."""

    passes: tuple[str, ...]
    shape: tuple[str, ...]
    """Names of what else the table's function decides by: as it is, or a class where sizes vary."""
    tile: tuple[str, ...]
    """Fields of a tile; those of the shape are not among them."""


ATTENTION_TILE = ("rows", "columns", "num_warps", "num_stages", "max_registers")
FORMS = {
    "attention": Form(
        passes=get_args(Pass),
        shape=("head_dim", "block_size", "globals", "biased"),
        tile=ATTENTION_TILE,
    ),
    "cross": Form(passes=get_args(CrossPass), shape=("head_dim", "queries"), tile=ATTENTION_TILE),
    "contrast": Form(
        passes=get_args(ContrastPass),
        shape=("dim", "rows"),
        tile=(*ATTENTION_TILE, "chunk", "slice", "programs"),
    ),
}
DTYPES = ("float32", "float16", "bfloat16")
REGISTERS = 65536
"""Of a multiprocessor."""

Key = tuple[str, str, str, tuple[int, ...]]


def key(table: str, which: str, dtype: str, shape: Mapping[str, int]) -> Key:
    """What entries are looked up by."""
    return table, which, dtype, tuple(shape[name] for name in FORMS[table].shape)


def architecture(arch: int) -> str:
    """The name of an architecture, which its table bears: sm_90, or interpreter for 0."""
    return f"sm_{arch}" if arch else "interpreter"


def user_file(arch: int) -> Path:
    """Where a user's table is: below $XDG_CACHE_HOME, else ~/.cache."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    cached = Path(folder if os.path.isabs(folder) else os.path.expanduser("~/.cache"))
    return cached / "svitt-ops" / "tiles" / f"{architecture(arch)}.json"


@cache
def in_use(arch: int) -> tuple[str, Mapping[Key, Mapping[str, int]]]:
    """Which table is in use, in words, and its tiles.

    Raises:
        ValueError: SVITT_TILES names a file that cannot be used.
    """
    named = os.environ.get("SVITT_TILES")
    if named:
        try:
            return named, read(Path(os.path.expanduser(named)), arch)
        except (OSError, ValueError) as error:
            raise ValueError(f"SVITT_TILES: {_line(named, error)}") from None
    refused = ""
    for path in () if named == "" else (user_file(arch), SHIPPED / f"{architecture(arch)}.json"):
        try:
            return str(path) + refused, read(path, arch)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            refused += f"; not {_line(path, error)}"
            warnings.warn(f"svitt_ops: tile table not used: {_line(path, error)}", stacklevel=2)
    return f"built-in{refused}{'; SVITT_TILES is empty' * (named == '')}", {}


def read(path: Path, arch: int) -> dict[Key, Mapping[str, int]]:
    """The tiles of a file, by key.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no table, or not of this architecture; in a line.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    return check(document, arch)


def check(document: Any, arch: int) -> dict[Key, Mapping[str, int]]:
    """The tiles of a table, by key; a ValueError, in a line, if anything is not as it must be."""
    _fields("table", document, ("schema", "architecture", "device", "versions", "entries"))
    for name, wanted in {"schema": SCHEMA, "architecture": architecture(arch)}.items():
        if document[name] != wanted:
            raise ValueError(f"{name} must be {wanted!r}, got {document[name]!r}")
    if not isinstance(document["entries"], list):
        raise ValueError("entries must be a list")
    found: dict[Key, Mapping[str, int]] = {}
    for number, entry in enumerate(document["entries"]):
        try:
            made = check_entry(entry)
        except ValueError as error:
            raise ValueError(f"entries[{number}]: {error}") from None
        if made in found:
            raise ValueError(f"entries[{number}]: the same as an earlier one")
        found[made] = entry["tile"]
    return found


def check_entry(entry: Any) -> Key:
    """The key of an entry; a ValueError if its tile is not a legal one, or a field is unknown."""
    _fields("entry", entry, ("table", "pass", "dtype", "shape", "tile", "case", "today_ms", "ms"))
    table, which, dtype = (entry[name] for name in ("table", "pass", "dtype"))
    _one_of("table", table, tuple(FORMS))
    form = FORMS[table]
    _one_of("pass", which, form.passes)
    _one_of("dtype", dtype, DTYPES)
    for name in ("shape", "tile"):
        _fields(name, entry[name], getattr(form, name))
        if any(type(x) not in (int, bool) for x in entry[name].values()):
            raise ValueError(f"{name} must be whole numbers, got {entry[name]}")
    tile = entry["tile"]
    # A dot product has 16 terms at least; at full precision there are no tensor cores to ask it.
    least = 4 if dtype == "float32" else 16
    legal: dict[str, Collection[int]] = {
        "rows": _powers(least, 256),
        "columns": _powers(least, 256),
        "chunk": _powers(16, 1024),
        "slice": _powers(16, 1024),
        "num_warps": _powers(1, 32),
        "num_stages": range(1, 9),
        "programs": range(1, 1 << 16),
        "max_registers": range(16, 256),
    }
    for name, value in tile.items():
        if type(value) is not int or value not in legal[name]:
            raise ValueError(f"tile has no legal {name}: {value}")
    # What is allotted to a warp is a multiple of 8 a thread.
    if tile["num_warps"] * 32 * (tile["max_registers"] & ~7) > REGISTERS:
        raise ValueError(f"tile takes more than {REGISTERS} registers: {tile}")
    return key(table, which, dtype, entry["shape"])


def _powers(least: int, most: int) -> list[int]:
    return [1 << x for x in range(16) if least <= 1 << x <= most]


def _fields(name: str, value: Any, wanted: tuple[str, ...]) -> None:
    if not isinstance(value, dict) or set(value) != set(wanted):
        got = ", ".join(value) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{name} must have {', '.join(wanted)}, got {got[:200]}")


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _line(path: str | Path, error: Exception) -> str:
    return " ".join(f"{path}: {getattr(error, 'strerror', None) or error}".split())[:400]

"""Tables of tuned tiles: which one is in use, what is refused, and that launchers follow it."""

import copy
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from svitt_ops.kernels import tile_table, tiles

ROOT = Path(__file__).parents[2]
CONTRAST = ("ranks", 256, 1000, torch.bfloat16, 90)
ATTENTION = ("forward", 64, 56, 1, torch.bfloat16, False, 90)
CROSS = ("forward", 32, 64, torch.bfloat16, 90)
TILE = {"rows": 32, "columns": 128, "num_warps": 2, "num_stages": 4, "max_registers": 128}


def table(arch: int = 90) -> dict[str, Any]:
    """An entry of each kernel table, for the calls above."""
    measured = {"case": "a case", "today_ms": 2.0, "ms": 1.0}
    contrast = TILE | {"chunk": 64, "slice": 128, "programs": 99}
    shape = {"head_dim": 64, "block_size": 56, "globals": 1, "biased": False}
    rows = [
        ("contrast", "ranks", {"dim": 256, "rows": 512}, contrast),
        ("attention", "forward", shape, TILE),
        ("cross", "forward", {"head_dim": 64, "queries": 32}, TILE),
    ]
    entries = [
        {
            "table": name,
            "pass": which,
            "dtype": "bfloat16",
            "shape": shape,
            "tile": tile,
            **measured,
        }
        for name, which, shape, tile in rows
    ]
    return {
        "schema": tile_table.SCHEMA,
        "architecture": tile_table.architecture(arch),
        "device": "a GPU",
        "versions": {"torch": "2", "triton": "3"},
        "entries": entries,
    }


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nobody's table, and nothing remembered of one."""
    monkeypatch.delenv("SVITT_TILES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tile_table, "SHIPPED", tmp_path / "shipped")
    tile_table.in_use.cache_clear()
    yield
    tile_table.in_use.cache_clear()


def put(path: Path, document: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    tile_table.in_use.cache_clear()
    return path


def columns() -> tuple[int, int, int]:
    tall = tiles.contrast_tile(*CONTRAST)
    return (
        tall.columns,
        tiles.attention_tile(*ATTENTION).columns,
        tiles.cross_tile(*CROSS).columns,
    )


def test_a_table_stands_before_the_functions_for_its_shapes_alone(tmp_path: Path) -> None:
    today = columns()
    other = ("ranks", 256, 4096, torch.bfloat16, 90), ("ranks", 256, 1000, torch.float16, 90)
    others = [tiles.contrast_tile(*x) for x in other]
    put(tile_table.user_file(90), table())
    assert columns() == (128, 128, 128) != today
    tile = tiles.contrast_tile(*CONTRAST)
    assert (tile.rows, tile.chunk, tile.slice, tile.programs) == (32, 64, 128, 99)
    assert tile.options["maxnreg"] == 128
    assert tiles.attention_tile(*ATTENTION).head_dim == 64
    assert [tiles.contrast_tile(*x) for x in other] == others
    assert tiles.attention_tile(*ATTENTION[:2], 64, *ATTENTION[3:]).columns != 128
    assert tiles.attention_tile(*ATTENTION[:-1], 80).columns != 128


def test_which_table_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tile_table.in_use(90) == ("built-in", {})
    shipped = put(tile_table.SHIPPED / "sm_90.json", table())
    assert tile_table.in_use(90)[0] == str(shipped)
    users = put(tile_table.user_file(90), table() | {"entries": []})
    assert users == tmp_path / "cache" / "svitt-ops" / "tiles" / "sm_90.json"
    assert tile_table.in_use(90) == (str(users), {})
    monkeypatch.setenv("SVITT_TILES", str(put(tmp_path / "named.json", table())))
    assert len(tile_table.in_use(90)[1]) == 3
    monkeypatch.setenv("SVITT_TILES", "")
    tile_table.in_use.cache_clear()
    assert tile_table.in_use(90) == ("built-in; SVITT_TILES is empty", {})


def test_a_table_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tile_table.user_file(90), table())
    before = columns()
    path.write_text("not JSON any more")
    assert columns() == before


Change = Callable[[dict[str, Any]], None]
REFUSED: dict[str, tuple[Change, str]] = {
    "schema": (lambda x: x.update(schema=2), "schema must be 1, got 2"),
    "architecture": (lambda x: x.update(architecture="sm_80"), "must be 'sm_90', got 'sm_80'"),
    "unknown field": (lambda x: x.update({"a\nnote": 1}), "table must have schema, "),
    "entries": (lambda x: x.update(entries={}), "entries must be a list"),
    "entry": (lambda x: x["entries"].append(1), "entries[3]: entry must have table, "),
    "twice": (lambda x: x["entries"].append(x["entries"][0]), "entries[3]: the same as"),
    "kernel table": (lambda x: x["entries"][0].update(table="gemm"), "table must be one of"),
    "list": (lambda x: x["entries"][0].update(table=[]), "table must be one of"),
    "pass": (lambda x: x["entries"][1].update({"pass": "ranks"}), "entries[1]: pass must be one"),
    "dtype": (lambda x: x["entries"][0].update(dtype="int8"), "dtype must be one of"),
    "shape": (lambda x: x["entries"][0]["shape"].pop("dim"), "shape must have dim, rows, got rows"),
    "tile": (lambda x: x["entries"][0]["tile"].update(ctas=2), "entries[0]: tile must have"),
    "no power": (lambda x: x["entries"][0]["tile"].update(rows=48), "no legal rows: 48"),
    "too few": (lambda x: x["entries"][0]["tile"].update(columns=8), "no legal columns: 8"),
    "stages": (lambda x: x["entries"][0]["tile"].update(num_stages=0), "no legal num_stages"),
    "text": (lambda x: x["entries"][0]["tile"].update(rows="64"), "must be whole numbers"),
    "real": (lambda x: x["entries"][0]["tile"].update(rows=64.0), "must be whole numbers"),
    "true": (lambda x: x["entries"][0]["tile"].update(num_warps=True), "no legal num_warps"),
    "registers": (
        lambda x: x["entries"][0]["tile"].update(num_warps=16, max_registers=255),
        "more than 65536 registers",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_table_that_is_not_one_is_refused_by_name(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, reason = REFUSED[what]
    today, document = columns(), copy.deepcopy(table())
    change(document)
    path = put(tile_table.user_file(90), document)
    with pytest.warns(UserWarning) as warned:
        assert columns() == today
    (warning,) = warned
    said = str(warning.message)
    assert str(path) in said and reason in said and "\n" not in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert columns() == today  # said once
    assert reason in tile_table.in_use(90)[0]
    monkeypatch.setenv("SVITT_TILES", str(path))
    tile_table.in_use.cache_clear()
    with pytest.raises(ValueError, match=r"^SVITT_TILES: ") as error:
        columns()
    assert reason in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("text", ["{", "", "[" * 100_000, "\udcff"])
def test_a_file_that_is_not_json_is_refused(text: str, tmp_path: Path) -> None:
    path = put(tile_table.user_file(90), "")
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match="is not JSON"):
        assert tile_table.in_use(90)[1] == {}


def test_a_file_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile_table.user_file(90).mkdir(parents=True)
    put(tile_table.SHIPPED / "sm_90.json", table())
    with pytest.warns(UserWarning, match=r"sm_90.json: Is a directory"):
        assert len(tile_table.in_use(90)[1]) == 3  # the next one
    monkeypatch.setenv("SVITT_TILES", str(tmp_path / "missing.json"))
    tile_table.in_use.cache_clear()
    with pytest.raises(ValueError, match=r"SVITT_TILES: .*missing.json: No such file"):
        columns()


def test_every_pass_and_field_is_known() -> None:
    """So that no table of the kernels is beyond `svitt tune`."""
    for which in tile_table.FORMS["contrast"].passes:
        tile = tiles.contrast_tile(which, 256, 4096, torch.bfloat16, 90)  # type: ignore[arg-type]
        assert set(vars(tile)) == set(tile_table.FORMS["contrast"].tile)
    tile_fields = set(vars(tiles.attention_tile(*ATTENTION))) - {"head_dim"}
    for name in ("attention", "cross"):
        assert tile_fields == set(tile_table.FORMS[name].tile)


CHECKED = """
import torch
from svitt_ops.kernels import compile_check, tiles
given = "ranks", 256, 1000, torch.bfloat16, 90
print(tiles.contrast_tile(*given).columns)
with compile_check.recorded_launches(90):
    print(tiles.contrast_tile(*given).columns)
"""


def test_what_is_compiled_without_a_gpu_is_built_in(tmp_path: Path) -> None:
    environment = os.environ | {"SVITT_TILES": str(put(tmp_path / "named.json", table()))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", CHECKED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["128", "64"]


def test_the_package_brings_its_tables(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "svitt_cli.py"):
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("kernels", "svitt_ops"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    put(tmp_path / "kernels" / "tuned" / "sm_90.json", table())
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "built"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    built = tmp_path / "built" / "svitt_ops" / "kernels"
    assert json.loads((built / "tuned" / "sm_90.json").read_text()) == table()
    assert (built / "tile_table.py").is_file()

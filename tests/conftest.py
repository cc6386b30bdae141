"""For every test: interpreted Triton where there is no GPU, few threads, and the gpu mark."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which is later
# Nobody's own table of tiles; one that is named is tested.
os.environ.setdefault("SVITT_TILES", "")
# Inductor's cache knows nothing of ATEN_CPU_CAPABILITY: it hands out code of another run's vectors.
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
# glibc's own number. With it chosen, a test that trains leaves its worker's heap as it is.
os.environ.setdefault("MALLOC_MMAP_MAX_", "65536")
# Beside other workers of pytest-xdist, one thread each.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))

if find_spec("hypothesis"):  # a GPU machine without a network may lack it
    from hypothesis import settings

    settings.register_profile("repeatable", deadline=None, derandomize=True)
    settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    said = "fail where an interpreted kernel touches memory that is not its own"
    parser.addoption("--watch-memory", action="store_true", help=said)


def pytest_configure(config: pytest.Config) -> None:
    if not HAS_GPU and find_spec("triton"):
        _round_interpreted_products_once()
        _index_by_numbers()
        _patch_the_language_once()
    if config.getoption("--watch-memory"):
        if HAS_GPU or not find_spec("triton"):
            raise pytest.UsageError(
                "--watch-memory is for interpreted Triton, on a machine without GPU"
            )
        from watched_memory import watched_memory

        watching = watched_memory()
        watching.__enter__()
        config.add_cleanup(lambda: watching.__exit__(None, None, None))


def _round_interpreted_products_once() -> None:
    """The interpreter multiplies in fp32 through numpy's BLAS, which adds up in an order of the
    processor's: no verdict may hang on that. Sums in fp64 round to the same fp32 in any order.
    And it multiplies the bits of bf16 as integers.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    as_they_are = interpreter.InterpreterBuilder.create_dot

    def values(x: Any) -> Any:
        if x.dtype.scalar == tl.bfloat16:
            return (x.data.astype(np.uint32) << 16).view(np.float32)
        return x.data

    def create_dot(builder: Any, a: Any, b: Any, d: Any, *how: Any) -> Any:
        left, right = values(a), values(b)
        if {left.dtype.kind, right.dtype.kind, d.data.dtype.kind} != {"f"}:
            return as_they_are(builder, a, b, d, *how)
        product = np.matmul(left, right, dtype=np.float64) + d.data
        return interpreter.TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _index_by_numbers() -> None:
    """Triton 3.6 takes an array of one element for a number, as numpy did before 2.4."""
    from triton.runtime import interpreter

    before = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        before(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda x: int(x.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch


def _patch_the_language_once() -> None:
    """Every call of a device function, tl.sum among them, patches all of triton.language as the
    launch around it has done: a third of the time that an interpreted kernel takes.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch_before, launch_before = interpreter._patch_lang, interpreter.GridExecutor.__call__
    nothing = interpreter._LangPatchScope()
    patched: set[frozenset[str]] | None = None  # of a launch: the names of modules
    modules: dict[Any, frozenset[str]] = {}

    def patch(function: Any) -> Any:
        if function not in modules:
            seen = function.__globals__.values()
            modules[function] = frozenset(
                x.__name__ for x in (tl, tl.core) if any(x is y for y in seen)
            )
        if patched is None:
            return patch_before(function)
        if modules[function] in patched:
            return nothing
        patched.add(modules[function])
        return patch_before(function)

    def launch(*arguments: Any, **options: Any) -> None:
        nonlocal patched
        around, patched = patched, set()
        try:
            launch_before(*arguments, **options)
        finally:
            patched = around

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch, launch

    type_before = interpreter._get_np_dtype  # makes a table of all types each time
    types: dict[str, Any] = {}

    def numpy_type(dtype: Any) -> Any:
        if dtype.name not in types:
            types[dtype.name] = type_before(dtype)
        return types[dtype.name]

    interpreter._get_np_dtype = numpy_type


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other at every small product are slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Python ends while threads of a group may still hold what is its own, which aborts some processes:
# a part that came to its end is done.
PART = """
import os, sys, torch, torch.distributed as dist
torch.set_num_threads(1)
rank, meeting = int(sys.argv.pop(1)), sys.argv.pop(1)
dist.init_process_group("gloo", init_method=f"file://{{meeting}}", rank=rank, world_size=2)
{code}
os._exit(0)
"""


@pytest.fixture(scope="session")
def on_two_ranks() -> Callable[..., None]:
    """A function that runs code in two processes of a group, with `rank` and `sys.argv[1:]` set."""

    def run(code: str, folder: Path, *words: str) -> None:
        script = folder / "part.py"
        script.write_text(PART.format(code=code))
        command = [sys.executable, str(script)]
        running = [
            subprocess.Popen(
                [*command, str(rank), str(folder / "meeting"), *words],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        ]
        try:
            said = [process.communicate(timeout=600)[1][-3000:] for process in running]
        finally:
            for process in running:
                process.kill()
        assert [process.returncode for process in running] == [0, 0], "\n".join(said)

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A fault on a GPU fails what follows in its process: a worker leaves its tests to others."""
    if HAS_GPU and report.failed and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)

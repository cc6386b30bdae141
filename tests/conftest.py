"""For every test: interpreted Triton where there is no GPU, few threads, and the gpu mark."""

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which is later
torch.set_num_threads(min(2, os.cpu_count() or 1))

if find_spec("hypothesis"):  # a GPU machine without a network may lack it
    from hypothesis import settings

    settings.register_profile("repeatable", deadline=None, derandomize=True)
    settings.load_profile("repeatable")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other at every small product are slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)

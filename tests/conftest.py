"""For every test: interpreted Triton where there is no GPU, few threads, and the gpu mark."""

import os
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)

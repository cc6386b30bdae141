"""Fixtures of the ops' tests: the implementations that the same test bodies run through."""

import os
from collections.abc import Iterator

import pytest
import torch

from svitt_ops import _extension
from svitt_ops.testing import Backend, route_to

SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")

cpp = pytest.param(
    "cpp",
    marks=pytest.mark.skipif(not _extension.load_cpu(), reason="the CPU extension is not built"),
)
# A sanitized run is about the C++ kernels; the others would only take long.
plain = pytest.param("reference", marks=pytest.mark.skipif(SANITIZED, reason="C++ only"))
interpreted = pytest.param(
    "triton",
    marks=pytest.mark.skipif(
        SANITIZED or torch.cuda.is_available(), reason="C++ only, or Triton runs for real"
    ),
)
gpu = pytest.param("cuda", marks=pytest.mark.gpu)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", [cpp, plain, interpreted, gpu], indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    if request.param == "triton":
        pytest.importorskip("triton")
    with route_to(request.param):
        yield request.param

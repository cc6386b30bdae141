"""Peers from other packages: where they are missing, and what stands in for them here."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.cases import cross_attention
from bench.measure import harness
from bench.peers import library

pytestmark = pytest.mark.usefixtures("one_thread")


def test_packages_are_found_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    for module, package in (("liger_kernel.transformers", "liger-kernel"), ("inf_cl", "inf-cl")):
        with pytest.raises(harness.Unavailable, match=f"{package} needs a GPU"):
            library.load(module, package, torch.device("cpu"))
        monkeypatch.setitem(sys.modules, module.partition(".")[0], None)
        with pytest.raises(harness.Unavailable, match=f"{package} is not installed"):
            library.load(module, package, gpu)


@pytest.mark.parametrize("name", ["flash_attn", "xformers"])
@pytest.mark.parametrize("masked", [False, True])
def test_adapters_of_attention_packages(
    name: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stand_in(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias)
        return out.transpose(1, 2)

    module = SimpleNamespace(flash_attn_func=stand_in, memory_efficient_attention=stand_in)
    monkeypatch.setattr(library, "load", lambda *_: module)
    cases = (x for x in cross_attention.cases("cpu") if bool(x.fields["masked"]) == masked)
    case = next(x for x in cases if x.dtype == "fp32")
    problem = cross_attention.problem(cross_attention.shrunk(case))
    provider = problem.provider(name)
    if masked and name == "flash_attn":
        with pytest.raises(harness.Unavailable, match="no padding mask"):
            provider.build()
        return
    for direction in harness.DIRECTIONS:
        found = harness.results(provider.build(), problem, direction)
        verdict = harness.gate(found, problem.oracles["op"](), torch.float32, direction)
        assert verdict["passed"], verdict["objection"]

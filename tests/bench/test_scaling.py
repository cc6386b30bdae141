"""The benchmark of scaling: a check that scales, and figures drawn from the data."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tqdm")

from bench.cases import block_sparse_attention, scaling
from bench.measure import environment, harness, results, sampled_check
from bench.report import __main__ as report
from bench.report import figures

TIMED = {"p20": 1.0, "p80": 1.0, "min": 1.0, "samples": 9, "method": "wall", "gate": {}}
RATES = {"gflops": 1.0, "gemm_ratio": 0.5, "floor_ratio": 2.0, "status": "ok", "reason": ""}


def small(batch: int = 2, heads: int = 3) -> harness.Case:
    case = next(x for x in scaling.cases("cpu") if not x.fields["bias"])
    fields = dict(case.fields) | {"tokens": 2000, "batch": batch, "heads": heads, "head_dim": 16}
    return dataclasses.replace(case, fields=fields)


def test_cases_vary_one_thing_at_a_time() -> None:
    for device, least in (("cpu", 1), ("cuda", 8)):
        found = scaling.cases(device)
        assert len({case.name for case in found}) == len(found)
        frames = {x.fields["frames"] for x in found if x.fields["blocks"] == 4}
        assert frames == {4, 8, 16, 32, 64}
        assert {x.fields["batch"] // least for x in found} == {1, 2, 4, 8}
        assert {x.fields["blocks"] for x in found} == {1, 2, 4, 8, 14, 28, 56}
    full = next(x for x in scaling.cases("cpu") if x.fields["blocks"] == 56)
    fields = dict(full.fields) | {"heads": 1}
    facts = scaling.problem(dataclasses.replace(full, fields=fields)).facts
    assert facts["edge_ratio"] == 1 and facts["density"] == 1


def test_the_sampled_check_is_the_op_s_in_the_corners() -> None:
    problem = scaling.problem(small())
    fields = dict(small().fields) | {"sampled": False}
    whole = block_sparse_attention.problem(dataclasses.replace(small(), fields=fields))
    for oracle in ("op", "dense"):
        found, wanted = problem.oracles[oracle](), whole.oracles[oracle]()
        assert set(found.values) == set(wanted.values)
        for name, value in found.values.items():
            assert value.shape[:2] == (2, 2)
            assert (value - sampled_check.corners(wanted.values[name])).abs().max() < 1e-12
            assert 0 < found.plain_error[name] < 1e-5


@pytest.mark.parametrize("biased", [False, True])
def test_both_sides_pass_their_gates_and_a_broken_head_does_not(biased: bool) -> None:
    case = next(x for x in scaling.cases("cpu") if x.fields["bias"] == biased)
    problem = scaling.problem(scaling.shrunk(case))
    assert next(x.name for x in problem.providers) == "svitt_ops" and len(problem.providers) == 2
    # The budget is twice the error of torch's own fp32, which is the processor's affair.
    dtype = torch.float16
    for provider in problem.providers:
        for direction in harness.DIRECTIONS:
            found = harness.results(provider.build(), problem, direction)
            expected = problem.oracles[provider.oracle]()
            verdict = harness.gate(found, expected, dtype, direction)
            assert verdict["passed"], verdict["objection"]
            found["out"] = found["out"].detach().clone()
            found["out"][-1, -1, 60] += 0.1
            assert not harness.gate(found, expected, dtype, direction)["passed"]


def invented(op: str = "scaling") -> dict[str, Any]:
    """A result whose times are what the edges say."""
    document: dict[str, Any] = {"schema": results.SCHEMA, "op": op, "command": "python -m bench"}
    where = environment.describe(torch.device("cpu"))
    document |= {"complete": True, "environment": where, "machine": {}, "results": []}
    for case in scaling.cases("cpu"):
        for direction in harness.DIRECTIONS:
            fields, tokens = case.fields, case.fields["tokens"]
            dense = tokens**2 * fields["batch"] / 1e6
            ratio = max(1.0, tokens / (56.0 * fields["blocks"]))
            row = {"role": "ours", "same_function": True, "note": "", **TIMED, **RATES}
            peer = row | {"provider": "sdpa_bias" if fields["bias"] else "sdpa_dense"}
            peer |= {"role": "peer", "ms": dense, "extra_bytes": tokens**2}
            ours = {"provider": "svitt_ops", "ms": 1.25 * dense / ratio, "extra_bytes": tokens}
            document["results"].append(
                {
                    "case": case.name,
                    "direction": direction,
                    "dtype": case.dtype,
                    "device": "cpu",
                    "fields": dict(fields),
                    "facts": {"edge_ratio": ratio},
                    "useful_flops": 1.0,
                    "bytes": 1.0,
                    "ceilings": {"gemm_gflops": 1.0, "copy_gbs": 1.0, "products": {}},
                    "floor_ms": 1.0,
                    "floor_bound": "compute",
                    "setup_ms": {},
                    "providers": [row | ours, peer],
                }
            )
    results.validate(document)
    return document


def test_figures_hold_the_data() -> None:
    document = invented()
    points = figures._sparsity_points(document, "bf16", "forward")
    assert len(points) == len(scaling.BLOCKS)
    for left_out, time in points:
        assert time == pytest.approx(1.25 * (100 - left_out))
    for who, bias, frames in (
        ("svitt_ops", False, scaling.FRAMES),
        ("dense", False, scaling.FRAMES),
        ("dense", True, scaling.BIAS_FRAMES),
    ):
        found = figures._frame_points(document, "fp32", who, bias, "extra_bytes")
        assert [x[0] for x in found] == list(frames)
    tokens = 4 * 196 + 1
    found = figures._frame_points(document, "fp32", "svitt_ops", False, "extra_bytes")
    assert found[0][1] == tokens / 2**20
    assert set(figures._floor_ratios(document)[("fp32", "forward")]) == {50.0}
    assert "50.0%" not in scaling.summary(document["results"][0])
    assert "of the edges" in scaling.summary(document["results"][0])


def test_figures_are_drawn_for_light_and_dark_pages(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import image

    documents = [invented(), invented("info_nce")]
    paths = figures.draw(documents, tmp_path)
    assert len(paths) == 6 and len(figures.names(documents)) == 3
    for path in paths:
        pixels = image.imread(path)
        assert pixels.shape[1] == 1600  # twice the width in the pages
        assert (pixels[0, 0, :3].mean() > 0.9) == path.stem.endswith("light")


def test_both_pages_show_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "bench" / "results"
    results.save(folder / "scaling.json", invented())
    short, docs = (tmp_path / "docs" / x for x in ("results.md", "benchmarks.md"))
    short.parent.mkdir()
    marks = ("scaling", "standing")
    short.write_text("".join(f"<!-- bench:{name} -->\n{report.END}\n" for name in marks))
    arguments = ["--short", str(short), "--docs", str(docs), "--results", str(folder)]
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    for path in (short, docs):
        text = path.read_text()
        assert text.count("<picture>") == 2
        for line in text.splitlines():
            for key in ("srcset=", "src="):
                name = line.partition(f'{key}"')[2].partition('"')[0]
                assert not name or (path.parent / name).is_file()
    next((folder / "figures").iterdir()).unlink()
    assert report.main([*arguments, "--check"]) == 1


def test_a_case_that_failed_is_left_out() -> None:
    document = copy.deepcopy(invented())
    for result in document["results"]:
        for row in result["providers"]:
            row |= {"status": "failed", "reason": "wrong"}
    assert not figures.names([document])
    assert not scaling.summary(document["results"][0])

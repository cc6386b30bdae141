"""The model of time: what it reads off machine code, its arithmetic, and what it says of itself."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench import __main__
from bench.cases import block_sparse_attention
from bench.measure import environment
from bench.predict import cards, code, facts, launches, model, older, rank, steps
from bench.predict import run as predictions
from bench.report import predict as report
from bench.tune import plan
from svitt_ops.kernels import cross_attention, machine_code

ROOT = Path(__file__).parents[2]
H100 = cards.card("h100")
PREDICTED = environment.RESULTS / "predict"
pytestmark = pytest.mark.usefixtures("one_thread")

LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_9) ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R3], desc[UR8][R4.64] ;
        /*0030*/                   ISETP.GE.AND P0, PT, R6, R7, PT ;
        /*0040*/               @P1 BRA `(.L_x_7) ;
.L_x_2:
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0060*/                   MUFU.EX2 R8, R9 ;
        /*0070*/               @P0 BRA `(.L_x_1) ;
        /*0080*/                   STG.E desc[UR8][R4.64], R8 ;
        /*0090*/                   EXIT ;
.L_x_7:
        /*00a0*/                   FADD R1, R1, R2 ;
        /*00b0*/                   FADD R1, R1, R2 ;
        /*00c0*/                   BRA `(.L_x_2) ;
.L_x_9:
        /*00d0*/                   EXIT ;
"""
"""A loop with a side that is out of line, which most steps do not take."""


def known(listing: str = LISTING, programs: int = 2) -> facts.Facts:
    usage: Any = SimpleNamespace(programs=programs)
    return facts.Facts(usage=usage, code=code.kernel(listing), tensor=True, wgmma=True)


def launched(programs: int, *tensors: torch.Tensor) -> launches.Launch:
    return launches.Launch(
        name="a.b", grid=(programs,), tensors=tensors, options={"num_warps": 4}, source="s"
    )


def predicted(turns: float = 10, programs: int = 264, **given: Any) -> model.Prediction:
    given = {"card": H100, "cached": 0.0, "facts": known(), **given}
    return model.predict(launched(programs), steps=steps.Steps(outer=turns), **given)


def test_a_loop_is_found_with_its_usual_way() -> None:
    kernel = code.kernel(LISTING)
    assert kernel.counts["issue"] == 4 and kernel.counts["bytes"] == 32 * 4
    (loop,) = kernel.loops
    assert not loop.loops and loop.products
    # Without the two FADD and the jump back from them.
    wanted = {"issue": 6, "alu": 2, "exp": 8, "memory": 16, "bytes": 512, "flops": 2 * 64 * 64 * 4}
    assert loop.counts == wanted


def test_a_loop_within_another_is_its_part() -> None:
    outer = LISTING.replace("/*0080*/", "/*0080*/  @P2 BRA `(.L_x_0) ;\n/*0081*/", 1)
    outer = outer.replace(".L_x_1:", ".L_x_0:\n /*0011*/ FADD R1, R1, R2 ;\n.L_x_1:", 1)
    (loop,) = code.kernel(outer).loops
    assert loop.counts["issue"] == 2 and [x.counts["issue"] for x in loop.loops] == [6]
    nested = replace(known(), code=code.kernel(outer))
    turned = model.way(nested, steps.Steps(outer=3, inner=5))
    assert turned["issue"] == 4 + 3 * (2 + 5 * 6)


def test_multiply_adds_are_products_where_there_are_no_tensor_cores() -> None:
    fused = "\n".join(f"/*{i:04x}*/ FFMA R1, R2, R3, R1 ;" for i in range(64))
    listing = f".L_x_1:\n{fused}\n/*1000*/ @P0 BRA `(.L_x_1) ;\n/*1010*/ EXIT ;\n"
    assert [x.products for x in code.kernel(listing).loops] == [True]
    few = listing.replace("FFMA", "FADD", 1)
    assert [x.products for x in code.kernel(few).loops] == [False]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("HMMA.16816.F32.BF16", {"flops": 4096}),
        ("HMMA.1688.F32.TF32", {"flops": 2048}),
        ("HGMMA.64x256x16.F32", {"flops": 2 * 64 * 256 * 16 / 4}),
        ("LDG.E.U16.CONSTANT", {"memory": 4, "bytes": 64}),
        ("LDG.E.64", {"memory": 8, "bytes": 256}),
        ("LDSM.16.M88.4", {"memory": 16}),
        ("SHFL.BFLY", {"memory": 4}),
        ("FFMA.FTZ", {}),
    ],
)
def test_an_instruction(name: str, wanted: dict[str, float]) -> None:
    assert code.counts_of(name) == {"issue": 1} | wanted


def test_each_limit_by_hand() -> None:
    found = predicted(turns=10, programs=264)  # two on each of 132 multiprocessors
    us = H100.clock_ghz * 1e3
    issue = 4 + 10 * 6
    assert found.limits["issue"] == pytest.approx(2 * 4 * issue / 4 / us)
    assert found.limits["exp"] == pytest.approx(2 * 4 * 80 / 4 / us)
    rate = 4096 * model.TENSOR_SHARE
    assert found.limits["tensor"] == pytest.approx(2 * 10 * 2 * 64 * 64 * 16 / rate / us)
    assert found.limits["latency"] == pytest.approx(issue * model.INSTRUCTION_CLOCKS / us)
    asked = 264 * 4 * (128 + 10 * 512)
    assert found.limits["l2"] == pytest.approx(asked / model.L2_BYTES / us)
    assert found.us == model.LAUNCH_US + max(found.limits.values())
    assert (found.programs, found.beside) == (264, 2)


def test_memory_binds_what_only_moves() -> None:
    table = torch.empty(2**24)  # nothing is written, so it takes no memory
    given = {"card": H100, "facts": None, "steps": steps.Steps()}
    found = model.predict(launched(1, table, table), cached=0.0, **given)
    assert found.bound == "dram"
    assert found.limits["dram"] == pytest.approx(2**26 / (3350e3 * model.DRAM_SHARE))
    assert model.predict(launched(1, table), cached=2.0**26, **given).bound == "launch"
    # A row that is broadcast is read once, and a program moves no more than it asks for.
    assert [*model.unique_bytes(launched(1, torch.empty(8).expand(9, 8))).values()] == [32]
    asked = model.predict(launched(1, table), H100, 0.0, known(), steps.Steps())
    assert asked.limits["dram"] == pytest.approx(4 * (128 + 512) / model.dram(H100))


def test_what_little_moved_since_is_still_in_l2(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = torch.empty(2**20), torch.empty(2**24)  # of 4 bytes, for an L2 of 50 MiB
    found = [launches.Launch(name="torch.x", tensors=(x,)) for x in (small, small, large, large)]
    predictor = predictions.Predictor(H100)
    predictor.recorded = lambda arch: nullcontext([*found, found[0]])
    monkeypatch.setattr(predictions, "runner", lambda *_: lambda: None)
    problem: Any = SimpleNamespace(provider=lambda name: SimpleNamespace(build=lambda: None))
    dram = [x.limits["dram"] > 0 for x in predictor.launches(problem, "forward")]
    assert dram == [True, False, True, True, True]


def test_more_work_takes_longer() -> None:
    assert predicted(turns=20).us > predicted(turns=10).us
    assert predicted(programs=2640).us > predicted(programs=264).us
    one = known(programs=1)
    latency = predicted(facts=one).limits["latency"]  # where less runs side by side
    assert latency == pytest.approx(2 * predicted().limits["latency"])
    planted = known(LISTING.replace("/*0060*/", "/*0060*/ IADD3 R1, R1, R2, R3 ;\n/*0061*/"))
    for limit in ("issue", "alu", "latency"):
        assert predicted(facts=planted).limits[limit] > predicted().limits[limit]
    slower = replace(H100, clock_ghz=1.0)
    assert predicted(card=slower).us > predicted().us
    assert predicted(facts=replace(known(), wgmma=False)).us > predicted().us


def test_a_product_that_is_not_found_is_said() -> None:
    plain = known(LISTING.replace("HGMMA.64x64x16.F32.BF16", "FFMA"))
    with pytest.raises(model.Unpredictable, match="no loop looks like a matrix product"):
        predicted(facts=plain)
    assert predicted(turns=1, facts=plain).us > model.LAUNCH_US


def attention(**given: Any) -> dict[str, Any]:
    shape = {"BLOCK_SIZE": 56, "COLUMNS": 64, "NUM_GLOBAL": 1, "ROWS": 64, "ROW_TILES": 1}
    return shape | {"counts_ptr": torch.tensor([4, 4, 1])} | given


def pairs(**given: Any) -> dict[str, Any]:
    shape = {"ROWS": 128, "COLUMNS": 64, "CHUNK": 64, "WHOLE": False, "dim": 256}
    return shape | {"b_count": 4096, "row_each": 8, "query_ids_ptr": None} | given


@pytest.mark.parametrize(
    ("kernel", "named", "wanted"),
    [
        ("block_sparse_attention._forward_kernel", attention(), {"outer": 3.0}),
        ("block_sparse_attention_backward._grad_key_kernel", attention(COLUMNS=32), {"outer": 6.0}),
        ("block_sparse_attention._forward_kernel", attention(COLUMNS=128), {"outer": 5 / 3}),
        # A tile of 64 tokens, and one of the global alone, which comes in a step of its own.
        (
            "block_sparse_attention._forward_kernel",
            attention(BLOCK_SIZE=64, ROW_TILES=2),
            {"outer": (3 + 1) / 2 + 1},
        ),
        (
            "cross_attention._forward_kernel",
            {"num_keys": 785, "parts": 2, "COLUMNS": 64, "mask_ptr": None},
            {"outer": 7},
        ),
        (
            "info_nce_backward._gradient_kernel",
            pairs(query_ids_ptr=torch.zeros(4096)),
            {"outer": 8, "inner": 4},
        ),
        # Of 64 tiles two are on the diagonal: of eight one stands outside, a quarter is special.
        (
            "info_nce._statistics_kernel",
            pairs(CHUNK=256, WHOLE=True),
            {"outer": 8, "walks": (6.75, 0.25)},
        ),
        (
            "info_nce_backward._gradient_kernel",
            pairs(),
            {"outer": 8, "inner": 4, "walks": (4, 6.75, 0.25)},
        ),
        (
            "sigmoid_nce._pairs_kernel",
            pairs(GRADIENTS=False),
            {"outer": 8, "inner": 4, "walks": (4, 7)},
        ),
        ("sigmoid_nce._pairs_kernel", pairs(GRADIENTS=True), {"outer": 8, "inner": 4}),
        ("info_nce._mean_kernel", {}, {}),
        # A tile of keys, three whole ones of the queue and a part of one: two, six and two of ten.
        (
            "queue_info_nce._sweep_kernel",
            {
                "each": 10,
                "COLUMNS": 32,
                "rows": 20,
                "queue_rows": 100,
                "queue_ids_ptr": None,
                "dim": 256,
                "CHUNK": 256,
            },
            {"outer": 10, "walks": (2.0, 6.0, 2.0)},
        ),
    ],
)
def test_how_often_loops_turn(kernel: str, named: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = steps.steps(launches.Launch(name=kernel, named=named))
    for name, times in vars(steps.Steps(**wanted)).items():
        assert getattr(found, name) == pytest.approx(times), name


def test_masked_keys_are_not_walked() -> None:
    mask = torch.zeros(2, 130, dtype=torch.int8)
    mask[:, 64:] = 1
    named = {"num_keys": 130, "parts": 1, "COLUMNS": 64, "mask_ptr": mask}
    launch = launches.Launch(name="cross_attention._forward_kernel", named=named)
    assert steps.steps(launch).outer == 1


def test_an_op_is_predicted_from_its_compiled_kernels(tmp_path: Path) -> None:
    """In a process without the interpreter, the smallest of kernels."""
    out = tmp_path / "found.json"
    given = ["--predict", "h100", "--op", "retrieval_ranks", "--case", "n1000-d256-bf16"]
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", *given, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not measured" in done.stdout and "clocks after each instruction" in done.stdout
    (row,) = json.loads(out.read_text())["results"]
    assert row["floor_ms"] < row["ms"] < 1
    ours, summed = row["launches"]
    assert ours["kernel"] == "retrieval_ranks._ranks_kernel" and summed["kernel"] == "torch.sum"
    assert ours["limits_us"]["tensor"] > 0.1 and ours["bound"] in ours["limits_us"]


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert __main__.main(["--op", "retrieval_ranks", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_cannot_be_predicted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    wanted = "card must be one of h100, h200, a100, got 'h300'"
    assert wanted in told(capsys, "--predict", "h300")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET must not be set" in told(capsys, "--predict", "h100")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "no case" in told(capsys, "--predict", "h100", "--case", "nothing")
    monkeypatch.setattr(machine_code.triton, "__file__", str(tmp_path / "__init__.py"))
    assert "nvdisasm is missing" in told(capsys, "--predict", "h100")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton" in told(capsys, "--predict", "h100")
    on_cpu = next(environment.RESULTS.glob("retrieval_ranks-intel-*.json"))
    assert "must be of a GPU" in told(capsys, "--predict", "h100", "--compare", str(on_cpu))
    for wrong, wanted in (
        (["--kernels", "HEAD"], "--kernels needs --predict"),
        (["--predict", "h100", "--provider", "x", "--cold"], "takes no --provider, --cold"),
        (["--predict", "h100", "--out", str(tmp_path)], "must be a FILE.json"),
    ):
        with pytest.raises(SystemExit):
            __main__.main(wrong)
        assert wanted in capsys.readouterr().err


def test_kernels_of_another_commit_need_a_process_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RuntimeError, match="begin a new process"), older.kernels_of("HEAD"):
        pass
    for name in [x for x in sys.modules if x.startswith("svitt_ops.kernels.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match="must name a commit"), older.kernels_of("no-such"):
        pass


def test_candidates_come_most_promising_first() -> None:
    groups: dict[str, list[plan.Candidate]] = {}
    for candidate in plan.plan():
        groups.setdefault(candidate.group, []).append(candidate)
    known, lacking = plan.predicted(), 0
    for name, rows in groups.items():
        ms = [known.get(name, {}).get(x.label, math.inf) for x in rows]
        assert rows[0].tile == {} and ms[1:] == sorted(ms[1:])
        lacking += sum(map(math.isinf, ms))
    assert lacking < len(plan.plan()) / 2, "stale: run python -m bench.predict.rank"
    # Also for a GPU of another size, whose tiles have other numbers of programs.
    orders = [[plan.on(x.tile, 1) | {"programs": 0} for x in plan.plan(n)] for n in (132, 108)]
    assert orders[0] == orders[1]


def test_ranking_writes_what_the_plan_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(rank, "Predictor", lambda card: card)
    monkeypatch.setattr(rank, "ranked", lambda card, chosen: [(chosen[0], card.clock_ghz)])
    out = tmp_path / "predicted.json"
    before = {group: dict(found) for group, found in plan.predicted().items()}
    first = plan.plan()[0].group
    assert rank.main(["--only", first, "--out", str(out)]) == 0
    wanted = {**before, first: {"today": 1.83}}  # what else there was stays
    assert json.loads(out.read_text())["predicted_ms"] == wanted
    assert plan.predicted() == before
    with pytest.raises(SystemExit):
        rank.main(["--card", "a100", "--out", str(out)])


def test_a_candidate_gets_its_tile_for_its_pass_alone() -> None:
    given = {"group": "cross_attention n785 forward forward", "label": "c32 w8 st1 reg128"}
    found = rank.candidate(given)
    wanted = {"columns": 32, "num_warps": 8, "num_stages": 1, "max_registers": 128}
    assert found.tile == wanted and found.which == "forward"
    assert rank.candidate(given | {"label": "today"}).tile == {}
    asked = (32, 64, torch.bfloat16, 90)
    before = [cross_attention.cross_tile(x, *asked) for x in ("forward", "grad")]
    with rank.tiled("forward", found.tile):
        tile, other = (cross_attention.cross_tile(x, *asked) for x in ("forward", "grad"))
    assert tile == replace(before[0], **wanted) != before[0] and other == before[1]
    assert cross_attention.cross_tile("forward", *asked) == before[0]
    known = block_sparse_attention.cases("cuda")
    assert rank.named(known, "n785-bias") == rank.named(known, "n785-bf16-bias")


def committed() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(PREDICTED.glob("*.json"))]


def test_the_fitted_constants_fit_what_was_measured() -> None:
    rows = [x for d in committed() for x in d["results"] if "measured_ms" in x]
    assert len(rows) >= 15

    def error(clocks: float, launch: float) -> float:
        total = 0.0
        for row in rows:
            us = 0.0
            for x in row["launches"]:
                limits = dict(x["limits_us"])
                if "latency" in limits:
                    limits["latency"] *= clocks
                us += max(limits.values()) + launch * model.LAUNCH_US
            total += math.log(us / 1e3 / row["measured_ms"]) ** 2
        return math.sqrt(total / len(rows))

    fitted = error(1, 1)
    assert fitted < math.log(1.25)
    assert all(error(*x) > fitted for x in ((0.9, 1), (1.1, 1), (1, 0.85), (1, 1.15)))


def test_committed_predictions_are_of_todays_model() -> None:
    for document in committed():
        card = cards.card(document["card"])
        assert document["assumptions"] == [str(card), *model.assumptions()]
        for row in document["results"]:
            assert row["ms"] == pytest.approx(sum(x["us"] for x in row["launches"]) / 1e3, rel=1e-3)
            for x in row["launches"]:
                assert x["us"] == pytest.approx(
                    model.LAUNCH_US + max(x["limits_us"].values()), rel=2e-3
                )


def test_the_report_has_both_tables(tmp_path: Path) -> None:
    text = report.render(PREDICTED)
    assert "Predictions, not measurements" in text
    assert "| predicted, ms | measured, ms | ratio |" in text and "in the quadratic mean" in text
    row = next(x for x in text.splitlines() if x.startswith("| info_nce | b16384-d512-bf16 |"))
    assert "| - |" not in row  # before and after
    assert report.render(tmp_path) == ""

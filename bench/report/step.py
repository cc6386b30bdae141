"""What the times of training steps mean, and their tables; needs no model."""

from __future__ import annotations

from typing import Any

from bench.measure import results
from bench.measure.results import Document
from bench.report.markdown import head, line

DENSE = ("dense", "dense_sdpa")
"""Providers of the dense model; `dense_plain` has no position bias."""
BASELINES = (*DENSE, "sdpa_eager")
"""Providers of all steps that others are compared with: the fastest of a case."""
COMPILED = "_compiled"
"""How the names of compiled steps end."""
GIB = 2.0**30
OPS = ("svitt_step", "momentum_step")
NOTE = """\
Time and memory of the hybrid step beside the fastest dense one that has the relative position bias;
`MACs` are the video tower's, hybrid of dense. Memory is the peak, with weights and optimizer state
(in brackets without them). MFU: FLOP/s over those of a large matrix product of the same dtype."""
MOMENTUM_NOTE = """\
Time and memory of a step of ALBEF and of SIMLA: all losses, the twin and its queues, by svitt_ops
and by torch: attention by SDPA, and losses that form the matrices of similarities. Memory is the
peak, with weights, optimizer state, twin and queues (in brackets without them)."""
NOTES = dict(zip(OPS, (NOTE, MOMENTUM_NOTE), strict=True))


def rates(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What a step's times mean, of each provider that has one.

    Returns:
        Provider -> `clips_s`, `tokens_s`, `mfu` (its own FLOP/s over those of a large product of
        the case's dtype in the same rounds), `time_ratio` (over the fastest of `BASELINES`, of a
        compiled step over the fastest compiled one) and
        `memory_bytes` (peak, with weights and optimizer state), where known.
    """
    facts, fields = result["facts"], result["fields"]
    products = result["ceilings"]["products"].items()
    product = max(rate for name, rate in products if f"_{result['dtype']}_" in name)
    rows = {row["provider"]: row for row in result["providers"] if row["status"] == "ok"}
    found = {}
    for name, row in rows.items():
        seconds = row["ms"] / 1e3
        ending = COMPILED if name.endswith(COMPILED) else ""
        baselines = [rows[x + ending]["ms"] for x in BASELINES if x + ending in rows]
        found[name] = {
            "clips_s": fields["batch"] / seconds,
            "tokens_s": facts["tokens"] / seconds,
            "mfu": row["gflops"] / product,
        }
        if baselines:
            found[name]["time_ratio"] = row["ms"] / min(baselines)
        if row.get("extra_bytes") is not None:
            found[name]["memory_bytes"] = facts["state_bytes"] + row["extra_bytes"]
    return found


def summary(result: dict[str, Any]) -> str:
    """Lines below the live table's rows."""
    of = _compared(result)
    lines = [f"{'':<22} {'provider':<20} {'clips/s':>9} {'tokens/s':>9} {'MFU':>7} {of:>9}"]
    for name, rate in rates(result).items():
        ratio = f"{rate['time_ratio']:.1%}" if "time_ratio" in rate else "-"
        lines.append(
            f"{'':<22} {name:<20} {rate['clips_s']:>9.3f} {rate['tokens_s']:>9.0f} "
            f"{rate['mfu']:>7.1%} {ratio:>9}"
        )
    if (ratio := result["facts"].get("mac_ratio")) is not None:
        lines.append(f"{'':<22} multiplications of the video tower, hybrid of dense: {ratio:.1%}")
    return "\n".join(lines)


def _compared(result: dict[str, Any]) -> str:
    return "of dense" if "mac_ratio" in result["facts"] else "of torch"


def render_short(document: Document) -> str:
    """A line for each case: ours against the fastest baseline."""
    if document["op"] == "momentum_step":
        return _render_momentum(document)
    columns = ["case", "hybrid, ms", "dense, ms", "of dense", "MACs", "clips/s", "MFU"]
    columns += ["memory, GiB", "dense"]
    lines = head(columns)
    for result in document["results"]:
        lines.append(_short_line(result, ""))
        if results.timed(result, f"hybrid{COMPILED}"):
            lines.append(_short_line(result, COMPILED))
    return "\n".join(lines)


def _short_line(result: dict[str, Any], ending: str) -> str:
    """The hybrid step beside the fastest dense one, both eager or both compiled."""
    name, case = f"hybrid{ending}", result["case"] + ending.replace("_", ", ")
    hybrid = results.timed(result, name)
    if hybrid is None:
        failed = "failed" if results.row_of(result, name) else ""
        return line([case, failed, *[""] * 7])
    found = rates(result)
    rivals = (x + ending for x in DENSE if x + ending in found)
    dense = min(rivals, key=lambda x: _ms(result, x), default="")
    mine = found[name]
    cells = [case, f"{hybrid['ms']:.0f}"]
    cells += [f"{dense} {_ms(result, dense):.0f}" if dense else "-"]
    cells += [f"{mine['time_ratio']:.1%}" if dense else "-"]
    cells += [f"{result['facts']['mac_ratio']:.1%}", f"{mine['clips_s']:.2f}"]
    cells += [f"{mine['mfu']:.0%}", _memory(result, name), _memory(result, dense)]
    return line(cells)


def _render_momentum(document: Document) -> str:
    columns = ["case", "svitt_ops, ms", "torch, ms", "of torch", "pairs/s", "memory, GiB", "torch"]
    lines = head(columns)
    for result in document["results"]:
        found, cells = rates(result), [result["case"]]
        for name in ("svitt_ops", "sdpa_eager"):
            cells.append(f"{_ms(result, name):.0f}" if name in found else "failed")
        mine = found.get("svitt_ops", {})
        cells.append(f"{mine['time_ratio']:.1%}" if "time_ratio" in mine else "-")
        cells.append(f"{mine['clips_s']:.2f}" if mine else "-")
        cells += [_memory(result, "svitt_ops"), _memory(result, "sdpa_eager")]
        lines.append(line(cells))
    return "\n".join(lines)


def render(document: Document) -> str:
    """A line for each provider of each case."""
    of = _compared(document["results"][0])
    columns = ["case", "provider", "ms", of, "clips/s", "tokens/s", "GFLOP", "MFU"]
    lines = head([*columns, "memory, GiB"], texts=2)
    for result in document["results"]:
        found = rates(result)
        for row in result["providers"]:
            cells = [result["case"], row["provider"]]
            if row["status"] != "ok":
                lines.append(line([*cells, row["status"], *[""] * 6]))
                continue
            rate = found[row["provider"]]
            cells.append(f"{row['ms']:.0f} ({row['p20']:.0f}-{row['p80']:.0f})")
            cells.append(f"{rate['time_ratio']:.1%}" if "time_ratio" in rate else "-")
            cells += [f"{rate['clips_s']:.2f}", f"{rate['tokens_s']:.0f}"]
            cells += [f"{row['flops'] / 1e9:.0f}", f"{rate['mfu']:.0%}"]
            lines.append(line([*cells, _memory(result, row["provider"])]))
    return "\n".join(lines)


def _ms(result: dict[str, Any], name: str) -> float:
    row = results.row_of(result, name)
    assert row is not None
    return float(row["ms"])


def _memory(result: dict[str, Any], name: str) -> str:
    row = results.row_of(result, name)
    if row is None or row.get("extra_bytes") is None:
        return "-"
    extra, state = row["extra_bytes"], result["facts"]["state_bytes"]
    return f"{(state + extra) / GIB:.2f} ({extra / GIB:.2f})"

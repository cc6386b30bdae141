"""What the report says of results: exceptions by name, and only numbers that are in the data."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench.measure import environment, results
from bench.report import __main__ as report
from bench.report import demo, standing


def beside(case: str, ours: float, peer: float, floor_ratio: float = 1.25) -> dict[str, Any]:
    """A row of ours beside a peer's, and a faster one of another function."""
    row: dict[str, Any] = {"status": "ok", "ms": peer, "floor_ratio": floor_ratio}
    return {
        "case": case,
        "dtype": "fp32",
        "direction": "forward",
        "providers": [
            row | {"provider": "svitt_ops", "role": "ours", "same_function": True, "ms": ours},
            row | {"provider": "rival", "role": "peer", "same_function": True},
            row | {"provider": "other", "role": "peer", "same_function": False, "ms": peer / 9},
        ],
    }


def test_exceptions_are_named() -> None:
    rows = [beside("ahead", 1.0, 2.0), beside("level", 1.0, 0.99), beside("behind", 1.0, 0.5, 4.0)]
    document = {"op": "info_nce", "environment": {"hardware": "a machine"}, "results": rows}
    text, short = standing.render([document]), standing.render_short([document])
    count = "ahead of every peer in 1 of 3 rows, level with the best in 1, behind in 1."
    assert count in text and count in short
    assert "| info_nce | behind | forward | 1.00 | rival 0.50 | 0.50 |  |" in text
    assert "| info_nce | level | forward | 1.00 | rival 0.99 | 0.99 | level |" in text
    assert "| ahead |" not in text and "other" not in text + short
    assert "`info_nce` forward: behind (rival, 0.50)." in short and "level (" not in short
    assert "| info_nce | 1 of 3: 25% |" in text
    rows[2]["providers"][0] = {"provider": "svitt_ops", "role": "ours", "status": "failed"}
    assert "| behind | forward | failed | rival 0.50 | - |" in standing.render([document])
    assert "behind (rival, ours failed)" in standing.render_short([document])
    del rows[1:]
    assert "behind in none" in standing.render([document])
    assert "none of 1" in standing.render([document]) and "| rival" not in standing.render(
        [document]
    )


def test_committed_texts_hold_the_committed_results() -> None:
    assert report.main(["--check"]) == 0
    short, docs = (environment.REPOSITORY / "docs" / x for x in ("results.md", "benchmarks.md"))
    numbers = set(re.findall(r"\d+\.\d+", docs.read_text()))
    assert len(numbers) > 100
    named = docs.read_text().partition("## Where a peer is ahead")[2].partition("\n## ")[0]
    for path in environment.RESULTS.glob("*.json"):
        for result in results.load(path)["results"]:
            best, mine = results.best_peer(result), results.ours(result)
            if best is None or mine is None or result["direction"] not in standing.DIRECTIONS:
                continue  # steps have a table of their own
            line = f"| {result['case']} | {standing.DIRECTIONS[result['direction']]} | "
            line += f"{mine['ms']:.2f} | {best['provider']} {best['ms']:.2f} |"
            assert (line in named) == (best["ms"] < mine["ms"])
            if best["ms"] < 0.97 * mine["ms"]:
                words = f"{result['case']} ({best['provider']}, {best['ms'] / mine['ms']:.2f})"
                assert words in short.read_text()


def test_the_record_names_files_that_exist() -> None:
    text = (environment.REPOSITORY / "docs" / "tuning.md").read_text()
    paths = re.findall(r"`((?:csrc|kernels|bench)/[^`]+)`", text)
    assert len(paths) > 5 and all(any(environment.REPOSITORY.glob(path)) for path in paths)


def test_table_of_demos(tmp_path: Path) -> None:
    found = {"R1": 41.0, "R5": 99.0}
    both = {"text_to_video": found, "video_to_text": found}
    before = {way: {"R1": 38.0, "R5": 98.0} for way in both}
    answers = {"score": 88.0, "majority": 17.0, "order": 96.0, "order_shuffled": 51.0}
    facts = {
        "seed": 1,
        "frames": 8,
        "corpus": {"motion": False},
        "retrieval": {**both, "contrastive": before, "videos": 100},
        "tasks": {"qa": {**answers, "questions": 600, "by_type": {"count": {"accuracy": 49.0}}}},
        "survivors": {
            "visual": {"share": 0.3, "random": 0.2},
            "multimodal": {"share": 0.27, "random": 0.09},
        },
        "load": 2.0,
        "seconds_per_step": {"sparse": 0.3, "dense": 0.4},
        "pair_accuracy": {"normal": 94.25, "shuffled": 47.5},
        "tokens": {"visual": [128, 77], "multimodal": [77, 24]},
        "edges": {"edges": 1000, "dense": 4000},
        "figure": "/of/somebody/survivors.png",
    }
    path, folder = tmp_path / "demo.json", tmp_path / "results" / "demo"
    path.write_text(json.dumps(facts))
    with pytest.raises(SystemExit):
        demo.main([str(path), "--out", str(folder)])  # it did not end
    path.write_text(json.dumps(facts | {"seconds": {"total": 300.0}}))
    assert demo.main([str(path), "--out", str(folder)]) == 0
    assert "somebody" not in (folder / "seed-1.json").read_text()
    path.write_text(json.dumps(facts | {"seconds": {"total": 330.0}, "corpus": {"motion": True}}))
    assert demo.main([str(path), "--out", str(folder)]) == 0
    assert (folder / "motion-seed-1.json").is_file()
    dense = {"edges": {"edges": 4000, "dense": 4000}, "seconds": {"total": 420.0}}
    path.write_text(json.dumps(facts | dense))
    assert demo.main([str(path), "--out", str(folder)]) == 0
    assert (folder / "dense-seed-1.json").is_file()
    events, moving = demo.render(demo.load(folder)).split("`svitt demo --seed N --motion`")
    events, dropping = events.split("`svitt demo --seed N model.edge_sparsity=false ")
    assert "minutes | 7.0 |" in dropping and "of a dense one's time | 75% |" in events
    for row in (
        "R@1, text to video | 41 %",
        "before re-ranking | 38 %",
        "told apart | 94.2 %",
        "answered rightly | 88.0 %",
        "of count | 49.0 %",
        "of order, with shuffled frames | 51.0 %",
        "survivors on objects, of random ones' | 1.50 x",
        "survivors on named objects, of random ones' | 3.00 x",
    ):
        assert f"{row} |" in events and f"{row} |" in moving
    assert "minutes | 5.0 |" in events and "minutes | 5.5 |" in moving
    assert "128 -> 77 -> 24" in events

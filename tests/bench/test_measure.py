"""How the benchmark times: quantiles, turns, floors."""

import time

import pytest
import torch

from bench.measure import floors, timing


def test_the_native_probe_measures_or_says_why_not() -> None:
    found = floors.machine(torch.device("cpu"))
    if "reason" not in found:
        for rates in (found["fma_gflops"], found["copy_gbs"]):
            assert str(torch.get_num_threads()) in rates and min(rates.values()) > 0
    assert floors.machine(torch.device("cuda")) == {}


def test_floor() -> None:
    rates = {"copy_gbs": 10.0, "peak_gflops": 100.0}
    assert floors.floor_ms(1e9, 1e6, rates) == (pytest.approx(10.0), "compute")
    assert floors.floor_ms(1e6, 1e9, rates) == (pytest.approx(100.0), "memory")


def test_quantiles() -> None:
    values = [5.0, 1.0, 2.0, 4.0, 3.0]
    assert timing.quantiles(values, (0.0, 0.2, 0.5, 0.8, 1.0)) == pytest.approx([1, 1.8, 3, 4.2, 5])
    assert timing.quantiles([7.0], (0.2, 0.5)) == [7.0, 7.0]
    with pytest.raises(ValueError, match="empty"):
        timing.quantiles([], (0.5,))


def test_slow_calls_take_part_in_fewer_rounds() -> None:
    effort = timing.Effort(budget_s=0.05, min_samples=3, max_samples=20)
    calls = {"slow": lambda: time.sleep(0.01), "fast": lambda: None}
    samples = timing.interleave(calls, torch.device("cpu"), effort)
    assert 3 <= len(samples["slow"].ms) <= 20
    assert len(samples["fast"].ms) >= len(samples["slow"].ms)


def test_very_slow_calls_are_timed_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SLOW_MS", 5.0)
    calls = []

    def slow() -> None:
        calls.append(time.sleep(0.01))

    samples = timing.interleave({"slow": slow}, torch.device("cpu"), timing.Effort(budget_s=0.001))
    assert len(calls) == len(samples["slow"].ms) == 3
    assert min(samples["slow"].ms) >= 10

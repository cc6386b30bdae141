"""The chunk sampler: bounds, middle, ends, short videos, rates, and frame orders."""

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svitt_ops.training.data.sampling import reorder, sample_positions, split_clips

lengths = st.integers(1, 200)
frames = st.integers(1, 20)


@given(lengths, frames, st.booleans(), st.integers(0, 5))
def test_rand_takes_one_frame_of_each_chunk(n: int, t: int, official: bool, seed: int) -> None:
    chosen = sample_positions(range(n), t, "rand", random.Random(seed), official=official)
    assert len(chosen) == t
    assert chosen == sorted(chosen)
    assert chosen[0] >= 0
    assert chosen[-1] < n
    bounds = [n * k // t for k in range(t + 1)]
    if n >= t and not official:
        assert all(bounds[k] <= f < bounds[k + 1] for k, f in enumerate(chosen))
    if official and n >= 2 * t:
        assert all(bounds[k] <= f < bounds[k + 1] - 1 for k, f in enumerate(chosen))
    if n <= t:
        assert chosen == list(range(n)) + [n - 1] * (t - n)


def test_rand_reaches_every_frame_and_official_not() -> None:
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    for official, found in seen.items():
        rng = random.Random(0)
        for _ in range(300):
            found.update(sample_positions(range(8), 2, "rand", rng, official=official))
    assert seen[False] == set(range(8))
    assert seen[True] == {0, 1, 2, 4, 5, 6}


def test_official_falls_back_to_a_sorted_subset() -> None:
    drawn = {
        tuple(sample_positions(range(5), 4, "rand", random.Random(k), official=True))
        for k in range(50)
    }
    assert len(drawn) == 5  # all subsets of 4 of 5 frames


def test_middle() -> None:
    assert sample_positions(range(16), 4, "middle") == [1, 5, 9, 13]
    assert sample_positions(range(10), 3, "middle") == [1, 4, 7]
    assert sample_positions(range(2), 4, "middle") == [0, 1, 1, 1]
    assert sample_positions([0.0], 3, "middle") == [0, 0, 0]


def test_fps_goes_by_time_not_by_number() -> None:
    steady = [k / 10 for k in range(40)]
    assert sample_positions(steady, 4, "fps1") == [5, 15, 25, 35]
    uneven = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.5, 2.5, 3.5]
    assert sample_positions(uneven, 4, "fps1") == [5, 6, 7, 8]
    assert len(sample_positions(steady, 2, "fps8")) == 2


@pytest.mark.parametrize("mode", ["fps0", "fps", "fpsx", "first"])
def test_unknown_modes_are_named(mode: str) -> None:
    with pytest.raises(ValueError, match="mode"):
        sample_positions(range(5), 2, mode)


def test_split_clips() -> None:
    assert split_clips(range(6), 2, strided=False) == [[0, 1, 2], [3, 4, 5]]
    assert split_clips(range(6), 2, strided=True) == [[0, 2, 4], [1, 3, 5]]
    with pytest.raises(ValueError, match="5 frames"):
        split_clips(range(5), 2, strided=True)


def test_orders() -> None:
    rng = random.Random(0)
    assert reorder(4, "normal", rng) == [0, 1, 2, 3]
    assert reorder(4, "reversed", rng) == [3, 2, 1, 0]
    assert reorder(4, "frozen", rng) == [1, 1, 1, 1]
    assert sorted(reorder(4, "shuffled", rng)) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="order"):
        reorder(4, "sideways", rng)


def test_frames_of_scl_are_the_authors() -> None:
    """In evaluation from end to end; drawn ones of chunks without their last frame."""
    case = Path(__file__).parents[2] / "golden" / "scl" / "case.json"
    for name, wanted in json.loads(case.read_text())["frame_sampling"].items():
        frames, length = map(int, re.findall(r"\d+", name))
        assert sample_positions(range(length), frames, "ends") == wanted["uniform"], name
        if wanted["random_raises"]:  # theirs takes another video
            continue
        rng = random.Random(0)
        drawn = [
            sample_positions(range(length), frames, "rand", rng, official=True) for _ in range(300)
        ]
        first, last = ([pick(x) for x in zip(*drawn, strict=True)] for pick in (min, max))
        for found, extreme in ((first, wanted["random_min"]), (last, wanted["random_max"])):
            # Of 300 draws of up to 75 frames the least and the greatest lie near the ends.
            slack = 0 if length <= 77 else 6
            assert all(abs(a - b) <= slack for a, b in zip(found, extreme, strict=True)), name

"""Which frames of a video make a clip."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Sequence

FrameOrder = str
ORDERS = ("normal", "shuffled", "reversed", "frozen")


def sample_positions(
    times: Sequence[float],
    num_frames: int,
    mode: str,
    rng: random.Random | None = None,
    *,
    official: bool = False,
) -> list[int]:
    """Positions of the frames of a clip, ascending, `num_frames` of them.

    The video is cut into `num_frames` chunks of equal length, unless `mode` is "ends". A video with
    fewer frames gives all it has, the last one repeated.

    Args:
        times: seconds of every frame of the video, ascending.
        num_frames: frames wanted.
        mode: "rand": one frame of each chunk, uniformly; "middle": the one in its middle; "ends":
            the first, the last, and others evenly between them, some twice in a short video;
            "fpsX", such as "fps2.5": the frames nearest to (k + 0.5) / X seconds, of which as many
            as wanted are spread over the video.
        rng: what "rand" draws from.
        official: draw as the released SViTT does: never the last frame of a chunk, and a sorted
            random subset where a chunk has one frame only.
    """
    count = len(times)
    if count < 1 or num_frames < 1:
        raise ValueError(f"a clip needs frames, got {count} to choose {num_frames} from")
    if mode.startswith("fps"):
        return _by_rate(times, num_frames, _rate(mode))
    if mode == "ends":
        gaps = max(num_frames - 1, 1)
        return [(count - 1) * k // gaps for k in range(num_frames)]
    chunks = min(num_frames, count)
    bounds = [count * k // chunks for k in range(chunks + 1)]
    spans = list(itertools.pairwise(bounds))
    if mode == "middle":
        chosen = [(start + end - 1) // 2 for start, end in spans]
    elif mode == "rand":
        if rng is None:
            raise ValueError("mode 'rand' needs an rng")
        if official and any(end - start < 2 for start, end in spans):
            chosen = sorted(rng.sample(range(count), chunks))
        else:
            last = 1 if official else 0
            chosen = [rng.randrange(start, end - last) for start, end in spans]
    else:
        raise ValueError(f"mode: must be 'rand', 'middle', 'ends' or 'fpsX', got {mode!r}")
    return _fill(chosen, num_frames)


def split_clips(positions: Sequence[int], num_clips: int, *, strided: bool) -> list[list[int]]:
    """Cut the frames of several clips apart: contiguous runs, or every `num_clips`-th frame."""
    length, rest = divmod(len(positions), num_clips)
    if rest:
        raise ValueError(f"{len(positions)} frames do not make {num_clips} clips of equal length")
    if strided:
        return [list(positions[k::num_clips]) for k in range(num_clips)]
    return [list(positions[k * length : (k + 1) * length]) for k in range(num_clips)]


def reorder(num_frames: int, order: FrameOrder, rng: random.Random) -> list[int]:
    """The frames of a clip in another order, to probe whether a model uses time.

    "frozen" repeats the middle frame; "shuffled" draws a permutation from `rng`.
    """
    frames = list(range(num_frames))
    if order == "shuffled":
        rng.shuffle(frames)
    elif order == "reversed":
        frames.reverse()
    elif order == "frozen":
        frames = [(num_frames - 1) // 2] * num_frames
    elif order != "normal":
        raise ValueError(f"order: must be one of {ORDERS}, got {order!r}")
    return frames


def _rate(mode: str) -> float:
    if not re.fullmatch(r"fps\d+(\.\d+)?", mode) or float(mode[3:]) <= 0:
        raise ValueError(f"mode: 'fpsX' needs a positive number X, got {mode!r}")
    return float(mode[3:])


def _by_rate(times: Sequence[float], num_frames: int, rate: float) -> list[int]:
    begin, end = times[0], times[-1]
    if math.isnan(begin):
        raise ValueError(f"sampling: 'fps{rate:g}' needs the fps of a folder of frames, got none")
    moments = [begin + (k + 0.5) / rate for k in range(max(1, round((end - begin) * rate)))]
    nearest, position = [], 0
    for moment in moments:
        while position + 1 < len(times) and (
            abs(times[position + 1] - moment) <= abs(times[position] - moment)
        ):
            position += 1
        nearest.append(position)
    if len(nearest) > num_frames:
        nearest = [nearest[len(nearest) * k // num_frames] for k in range(num_frames)]
    return _fill(nearest, num_frames)


def _fill(chosen: list[int], num_frames: int) -> list[int]:
    return chosen + [chosen[-1]] * (num_frames - len(chosen))

"""What a person brings: 20 films, 20 photos, and the JSON files that say what is in them.

Real enough to break what flat test pictures do not: 640 x 480, texture at every scale, sensor
noise, names with spaces and accents, one file that is missing and one that is cut off.
"""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

WIDTH, HEIGHT, RATE = 640, 480, 25
FILMS = PHOTOS = 20
COLOURS = {"red": (200, 40, 40), "green": (50, 170, 60), "blue": (50, 70, 200), "white": (230,) * 3}
SHAPES = ("ball", "box")
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
NOISE = np.random.default_rng(1).normal(0, 9, (2 * HEIGHT, 2 * WIDTH, 3)).astype(np.int16)
Picture = NDArray[np.uint8]


def write_corpus(folder: Path) -> None:
    """`videos/` with `my.json` beside it, `pictures/` with `pictures.json`.

    `questions.json`, `answers.json` and `choices.json` are about the same films; `similar.csv` has
    pairs of texts.
    """
    rng = np.random.default_rng(0)
    (folder / "videos").mkdir(parents=True)
    (folder / "pictures").mkdir()
    films, asked, choices = [], [], []
    for number in range(FILMS):
        colour, shape, way = _scene(number)
        name = f"holiday {number:02}.mp4" if number % 2 else f"Café_{number:02}.MP4"
        name = name if number else "clip.mp4"
        _film(folder / "videos" / name, rng, colour, shape, way)
        films.append({"video": name, "caption": f"A {colour} {shape} moves {way}, slowly."})
        question = {"video": name, "question": f"What colour has the {shape}?"}
        asked.append({**question, "answer": colour})
        others = [f"A {other} {shape} moves {way}." for other in COLOURS]
        right = list(COLOURS).index(colour)
        choices.append({"video": name, "caption": others, "answer": right})
    films[0]["caption"] = [films[0]["caption"], "Something crosses the picture."]
    broken = {"video": "cut off.mp4", "caption": "The camera's battery died."}
    whole = (folder / "videos" / films[1]["video"]).read_bytes()
    (folder / "videos" / broken["video"]).write_bytes(whole[: len(whole) // 3])
    missing = {"video": "deleted.mp4", "caption": "A film that is not there any more."}
    _write(folder / "my.json", [*films, broken, missing])
    # What people's files have: no answer, one that is in no list, a number that is no text's.
    asked += [{**asked[0], "answer": ""}, {**asked[1], "answer": "mauve"}]
    choices.append({**choices[0], "answer": len(COLOURS)})
    _write(folder / "questions.json", asked)
    _write(folder / "choices.json", choices)
    (folder / "answers.json").write_text(json.dumps(list(COLOURS)), encoding="utf-8")
    similar = ["sentence1,sentence2,score"]
    for number, colour in enumerate(COLOURS):
        similar.append(f'"A {colour} ball moves, slowly.",The {colour} ball moves.,{5 - number}')
        similar.append(f"A {colour} ball moves.,Nothing moves.,0")
    (folder / "similar.csv").write_text("\n".join(similar), encoding="utf-8")
    photos = []
    for number in range(PHOTOS):
        colour, shape, _ = _scene(number)
        name = f"DSC_{number:04}.JPG" if number else "photo.jpg"
        picture = _with_shape(
            _texture(rng, HEIGHT, WIDTH), colour, shape, (WIDTH // 2, HEIGHT // 2)
        )
        Image.fromarray(_noisy(rng, picture)).save(folder / "pictures" / name, "JPEG", quality=90)
        photos.append({"image": name, "caption": f"a photo of a {colour} {shape}"})
    _write(folder / "pictures.json", photos)


def _scene(number: int) -> tuple[str, str, str]:
    return (
        tuple(COLOURS)[number % len(COLOURS)],
        SHAPES[number // len(COLOURS) % len(SHAPES)],
        tuple(WAYS)[number % 7 % len(WAYS)],
    )


def _film(path: Path, rng: np.random.Generator, colour: str, shape: str, way: str) -> None:
    """Two seconds of H.264: a shape that moves over a picture that pans."""
    frames, pan = 2 * RATE, 2
    ground = _texture(rng, HEIGHT, WIDTH + pan * frames)
    dx, dy = WAYS[way]
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=RATE, options={"preset": "veryfast", "crf": "20"}
        )
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(frames):
            away = 6 * (number - frames // 2)
            centre = (WIDTH // 2 + dx * away, HEIGHT // 2 + dy * away)
            picture = _with_shape(ground[:, pan * number :][:, :WIDTH], colour, shape, centre)
            frame = av.VideoFrame.from_ndarray(_noisy(rng, picture), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _texture(rng: np.random.Generator, height: int, width: int) -> Picture:
    """Noise of every scale, as strong as it is coarse: what photos of the world look like."""
    total = np.zeros((height, width, 3), np.float32)
    for cell in (160, 80, 40, 20, 10, 5, 2):
        rows, columns = -(-height // cell) + 1, -(-width // cell) + 1
        coarse = rng.normal(0, 1.5 * cell**0.5, (rows, columns, 3)).astype(np.float32)
        for channel in range(3):  # Pillow scales floats one channel at a time
            plane = Image.fromarray(coarse[:, :, channel])
            plane = plane.resize((columns * cell, rows * cell), Image.Resampling.BICUBIC)
            total[:, :, channel] += np.asarray(plane)[:height, :width]
    return (total + 120).clip(0, 255).astype(np.uint8)


def _with_shape(ground: Picture, colour: str, shape: str, centre: tuple[int, int]) -> Picture:
    rows, columns = np.ogrid[:HEIGHT, :WIDTH]
    dx, dy = np.abs(columns - centre[0]), np.abs(rows - centre[1])
    inside = dx**2 + dy**2 < 70**2 if shape == "ball" else np.maximum(dx, dy) < 60
    return np.where(inside[:, :, None], np.uint8(COLOURS[colour]), ground)


def _noisy(rng: np.random.Generator, picture: Picture) -> Picture:
    """With a sensor's noise: a window of `NOISE`, drawn anew for every picture."""
    top, left = rng.integers(0, NOISE.shape[0] - HEIGHT), rng.integers(0, NOISE.shape[1] - WIDTH)
    noise = NOISE[top : top + HEIGHT, left : left + WIDTH]
    return (picture.astype(np.int16) + noise).clip(0, 255).astype(np.uint8)


def _write(path: Path, entries: list[dict[str, object]]) -> None:
    path.write_text(json.dumps(entries, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")

"""Referring expressions: texts that mean one thing of a picture, its box, and detected boxes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svitt_ops.training.data.annotations import Entry, Form, Record
from svitt_ops.training.data.paths import expand
from svitt_ops.training.data.places import label
from svitt_ops.training.tasks.parts.boxes import Box, check_inside, parse_box, to_number

TEXTS = ("text", "caption", "sentence")
BOX = ("box", "bbox")
SIZE = ("width", "height")
IMAGE_ID = "image_id"
DETECTIONS = "detections"


@dataclass(frozen=True, kw_only=True)
class Reference(Entry):
    """A text about one thing of a picture; the only one of its `captions`."""

    box: Box | None
    """Of the thing; None where only training asked."""
    detections: tuple[Box, ...]
    """Boxes to choose from, if there are any."""
    image_id: str | None
    place: str
    """Where it stands."""


def _training(record: Record) -> Reference:
    media = record.media
    if len(media) != 1:
        raise ValueError(f"must name one file, got {len(media)}")
    name = record.field(*TEXTS)
    texts = record.clean([record.whole(text, name) for text in record.texts(name)], name)
    if len(texts) != 1:
        raise ValueError(f"field {name!r} must be one text, got {len(texts)}")
    image_id = record.content.get(IMAGE_ID)
    return Reference(
        media=media,
        captions=texts,
        kind="image",
        together=record.together,
        box=None,
        detections=(),
        image_id=None if image_id is None else str(image_id),
        place=record.place,
    )


def _reference(record: Record) -> Reference:
    found = vars(_training(record))
    name = record.field(*BOX)
    box = parse_box(record.value(name), f"field {name!r}")
    detections: tuple[Box, ...] = ()
    if record.content.get(DETECTIONS) not in (None, ""):
        detections = _boxes(record.value(DETECTIONS), f"field {DETECTIONS!r}")
    missing = (None, "")  # cells of a table are empty
    size = [_length(record, side) for side in SIZE if record.content.get(side) not in missing]
    if len(size) == len(SIZE):
        check_inside(box, (size[0], size[1]), f"field {name!r}")
    return Reference(**{**found, "box": box, "detections": detections})


TRAINING = Form(texts=TEXTS, parse=_training)
"""Texts alone."""
REFERENCES = Form(texts=TEXTS, parse=_reference)
"""Texts and boxes."""


def read_detections(path: str | Path, name: str = "detections") -> dict[str, tuple[Box, ...]]:
    """Boxes by image: a JSON object of lists of boxes, as ALBEF's `dets.json`.

    Args:
        path: the file.
        name: of the option, which errors begin with.

    Raises:
        ValueError: the file cannot be read, or is no such object; says which image and box.
    """
    file = expand(path, name)
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{name}: {file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: {file}: must be JSON, but {error}") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"{name}: {file}: must be an object of lists of boxes, got {kind}")
    return {key: _boxes(value, f"{name}: {file}: image {key!r}") for key, value in content.items()}


def with_detections(
    references: Sequence[Reference], boxes: Mapping[str, tuple[Box, ...]]
) -> list[Reference]:
    """The references with the boxes of their images, where they have none of their own.

    An image is looked up by the entry's `image_id`, by its file's name without suffix, and by the
    number at the end of that, as of COCO's files.
    """
    return [
        ref if ref.detections else Reference(**{**vars(ref), "detections": _of_image(ref, boxes)})
        for ref in references
    ]


def _of_image(reference: Reference, boxes: Mapping[str, tuple[Box, ...]]) -> tuple[Box, ...]:
    stem = Path(label(reference.media[0])).stem
    digits = re.search(r"\d+$", stem)
    keys = [reference.image_id, stem, str(int(digits[0])) if digits else None]
    return next((boxes[key] for key in keys if key is not None and key in boxes), ())


def _boxes(value: object, what: str) -> tuple[Box, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{what} must be a list of boxes, got {type(value).__name__}")
    return tuple(parse_box(box, f"{what}: box {number}") for number, box in enumerate(value))


def _length(record: Record, name: str) -> float:
    value: Any = record.content[name]
    try:
        length = float(value) if isinstance(value, str) else to_number(value)
    except ValueError:
        length = math.nan
    if not 0 < length < math.inf:
        raise ValueError(f"field {name!r} must be a positive number, got {value!r:.80}")
    return length

"""A corpus of pictures for every task on images, in the annotation formats that people have.

Of each split there are pictures of a few things with colours, shapes, sizes and places
(`scenes`), and what is said of them (`scene_texts`):

| file | entries | form of |
|---|---|---|
| `train.json` | `image`, `caption`, `image_id`: one for each caption | ALBEF's COCO, Flickr30k |
| `validation.json`, `test.json` | `image`, `caption` (a list), `image_id` | the same |
| `*-questions.json`, `answers.json` | `image`, `question`, ten answers, their types | VQAv2 |
| `*-reasoning.json` | two `images`, `sentence`, `label`; to train on, `pool` | NLVR2 |
| `*-entailment.json` | `image` without its suffix, `sentence`, `label` | SNLI-VE |
| `*-grounding.json` | `image`, `text`, `ref_id`, `image_id`, `box`, `width`, `height` | RefCOCO+ |
| `*-classes.json` | `image`, `labels`: what there is in it | lists of classes, for hashing |
| `*-similarity.json` | `sentence1`, `sentence2`, `score` from 0 to 5 | STS |
| `detections.json` | boxes of all things by `image_id` | ALBEF's `dets.json` |

Boxes are [left, top, width, height] in pixels. No scene is in two splits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import numpy as np

from svitt_ops.training.corpora.scene_texts import (
    captions,
    classes,
    expressions,
    hypotheses,
    questions,
    similar_texts,
    statements,
)
from svitt_ops.training.corpora.scenes import PictureSpec, Scene, Split, plan

STATEMENTS = 5  # of a picture to test on; each is an entry with either label
POOL = 24  # pictures that statements to train on are about, so that a batch need not have more
POOL_STATEMENTS = 64  # of a pool
ROUNDS = 4  # pools that a picture is in
SIMILARITY = 4  # what pairs of texts are drawn by, besides the seed and the split
JPEG = {"quality": 92, "subsampling": 0}  # colours as they are, to the edge


def build_pictures(
    folder: str | Path,
    spec: PictureSpec,
    progress: Callable[[Iterable[Scene]], Iterable[Scene]] = iter,
) -> dict[Split, Path]:
    """Draw a corpus: `pictures/*.png` and `pictures/*.jpg`, and the files of annotations.

    The same specification gives the same files, byte by byte, with the same version of Pillow.

    Args:
        folder: where to; made if missing.
        spec: what to draw.
        progress: wraps the list of scenes, such as tqdm.

    Returns:
        The file with the captions of each split.

    Raises:
        ValueError: the specification cannot be met.
    """
    folder = Path(folder)
    scenes = plan(spec)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for scene in progress(scenes):
        for file, crated in ((scene.file, False), (scene.crated_file, True)):
            options = JPEG if file.endswith(".jpg") else {}
            scene.draw(crated=crated).save(folder / file, **options)
    answers: set[str] = set()
    for number, split in enumerate(get_args(Split)):
        mine = [scene for scene in scenes if scene.split == split]
        asked = [
            {**_about(scene), "dataset": "vqa", **q} for scene in mine for q in questions(scene)
        ]
        answers.update(answer for question in asked for answer in question["answer"])
        rng = np.random.default_rng((spec.seed, number, len(scenes)))
        contents: dict[str, Iterable[Any]] = {
            split: [row for scene in mine for row in _captioned(scene, spec.captions)],
            f"{split}-questions": asked,
            f"{split}-reasoning": _stated(rng, split, mine),
            f"{split}-entailment": hypotheses(rng, mine),
            f"{split}-grounding": [row for scene in mine for row in _named(scene)],
            f"{split}-classes": [{"image": s.file, "labels": classes(s)} for s in mine],
            f"{split}-similarity": similar_texts(
                np.random.default_rng((spec.seed, number, SIMILARITY)), mine
            ),
        }
        for name, rows in contents.items():
            _write(folder / f"{name}.json", list(rows))
    _write(folder / "answers.json", sorted(answers))
    boxes = {str(scene.number): [list(thing.box) for thing in scene.things] for scene in scenes}
    _write(folder / "detections.json", boxes)
    return {split: folder / f"{split}.json" for split in get_args(Split)}


def _about(scene: Scene) -> dict[str, Any]:
    return {"image": scene.file, "image_id": scene.number}


def _captioned(scene: Scene, count: int) -> list[dict[str, Any]]:
    texts = captions(scene, count)
    if scene.split == "train":
        return [{**_about(scene), "caption": text} for text in texts]
    return [{**_about(scene), "caption": texts}]


def _stated(rng: np.random.Generator, split: Split, scenes: list[Scene]) -> Iterable[Any]:
    """Statements about pairs of pictures; those to train on, about pairs of a `pool` each."""
    if split != "train":
        yield from statements(rng, scenes, STATEMENTS * len(scenes))
        return
    count = max(1, len(scenes) // POOL)
    pools = [p for _ in range(ROUNDS) for p in np.array_split(rng.permutation(len(scenes)), count)]
    for number, pool in enumerate(pools):
        for row in statements(rng, [scenes[k] for k in pool], POOL_STATEMENTS):
            yield {**row, "pool": number}


def _named(scene: Scene) -> list[dict[str, Any]]:
    size = {"width": scene.extent, "height": scene.extent}
    return [
        {**_about(scene), **size, "text": text, "ref_id": 10 * scene.number + k, "box": thing.box}
        for k, (text, thing) in enumerate(expressions(scene))
    ]


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

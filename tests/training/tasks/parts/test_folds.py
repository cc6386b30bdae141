"""Parts of a corpus that are searched apart."""

import pytest

from svitt_ops.training.data.annotations import Entry
from svitt_ops.training.tasks.parts.folds import fold_gallery, mean_of_folds
from svitt_ops.training.tasks.parts.gallery import build_gallery


def entry(number: int) -> Entry:
    texts = (f"one of {number}", f"other of {number}")
    return Entry(media=(f"/{number}.jpg",), captions=texts, kind="image")


def test_parts_in_the_order_of_the_corpus() -> None:
    gallery = build_gallery([entry(k) for k in range(7)])
    first, second = fold_gallery(gallery, 2)
    assert first.videos == [f"/{k}.jpg" for k in range(4)]
    assert second.videos == [f"/{k}.jpg" for k in range(4, 7)]
    assert first.texts + second.texts == gallery.texts
    assert (len(first.texts), set(first.text_groups)) == (8, set(first.video_groups))
    assert fold_gallery(gallery, 1) == [gallery]
    for folds in (0, 8):
        with pytest.raises(ValueError, match=f"--folds: must be 1 to 7, .* got {folds}"):
            fold_gallery(gallery, folds)


def test_means() -> None:
    def found(recall: float, count: int) -> dict[str, object]:
        table = {"R1": recall, "mean": recall + 1}
        counts = {"videos": count, "texts": 5 * count, "texts_cut": 1}
        return {"text_to_video": table, "mean": recall, "skipped": {str(count): "no"}, **counts}

    assert mean_of_folds([found(10, 3), found(20, 4)]) == {
        "text_to_video": {"R1": 15, "mean": 16},
        "mean": 15,
        "videos": 7,
        "texts": 35,
        "texts_cut": 2,
        "skipped": {"3": "no", "4": "no"},
        "folds": 2,
    }

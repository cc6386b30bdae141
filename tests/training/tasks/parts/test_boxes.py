"""Boxes, and those that a map means, against the plain sums."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from svitt_ops.training.tasks.parts.boxes import (
    Box,
    Grounded,
    area_share,
    best_box,
    best_detection,
    box_iou,
    box_scores,
    check_inside,
    ground_thing,
    grounding_accuracies,
    parse_box,
    points_into,
    upsample,
)


def test_overlap() -> None:
    assert box_iou((0, 0, 4, 4), (0, 0, 4, 4)) == 1
    assert box_iou((0, 0, 4, 4), (2, 0, 4, 4)) == pytest.approx(8 / 24)
    assert box_iou((0, 0, 4, 4), (4, 0, 4, 4)) == 0
    assert box_iou((1, 1, 2, 2), (0, 0, 4, 4)) == box_iou((0, 0, 4, 4), (1, 1, 2, 2)) == 0.25
    assert area_share((-5, 0, 10, 10), (10, 10)) == 0.5
    assert area_share((0, 0, 5, 4), (10, 10)) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2, 3], "must be 4 numbers"),
        ("1234", "must be 4 numbers"),
        (None, "must be 4 numbers"),
        ([1, 2, 3, "4"], "must be 4 numbers"),
        ([1, 2, 3, True], "must be 4 numbers"),
        ([1, 2, 3, math.nan], "must be 4 numbers"),
        ([1, 2, 3, math.inf], "must be 4 numbers"),
        ([1, 2, 3, 10**400], "must be 4 numbers"),
        ([1, 2, 0, 4], "must have an area"),
        ([1, 2, 3, -4], "must have an area"),
    ],
)
def test_what_is_no_box(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^detection 3 {message}"):
        parse_box(value, "detection 3")


def test_boxes_outside() -> None:
    check_inside(parse_box([-1, -1, 2, 2]), (4, 4))
    for outside in ([4, 0, 2, 2], [0, -2, 2, 2], [0, 5, 1, 1]):
        with pytest.raises(ValueError, match="box is outside of the picture of 4 x 4"):
            check_inside(parse_box(outside), (4, 4))


def test_a_box_has_its_sum_by_the_root_of_its_area() -> None:
    pixels = torch.rand(7, 9, generator=torch.Generator().manual_seed(0))
    boxes: list[Box] = [(0, 0, 9, 7), (2, 1, 3, 4), (2.7, 1.2, 3.1, 4.9), (-2, 3, 4, 9)]
    wanted = [
        pixels.sum() / 63**0.5,
        pixels[1:5, 2:5].sum() / 12**0.5,
        pixels[1:6, 2:5].sum() / (3.1 * 4.9) ** 0.5,
        pixels[3:7, 0:2].sum() / 36**0.5,
    ]
    torch.testing.assert_close(box_scores(pixels, boxes).float(), torch.stack(wanted))
    assert box_scores(pixels, [(3.2, 3.2, 0.1, 0.1)])[0] == pytest.approx(pixels[3, 3] / 0.1)
    assert best_detection(pixels, boxes) == boxes[int(torch.stack(wanted).argmax())]
    with pytest.raises(ValueError, match="must be at least one, got none"):
        best_detection(pixels, [])


def test_the_best_box_of_all() -> None:
    generator = torch.Generator().manual_seed(1)
    for rows, columns in ((1, 1), (3, 5), (4, 4)):
        saliency = torch.rand(rows, columns, generator=generator) ** 3
        found = best_box(saliency, (columns * 10, rows * 20))
        best = -1.0
        for top, left in itertools.product(range(rows), range(columns)):
            for bottom, right in itertools.product(range(top, rows), range(left, columns)):
                held = saliency[top : bottom + 1, left : right + 1]
                if (score := float(held.sum() / held.numel() ** 0.5)) > best:
                    best = score
                    wanted = (left * 10, top * 20, held.shape[1] * 10, held.shape[0] * 20)
        assert found == wanted


def test_maps_become_pixels() -> None:
    saliency = torch.zeros(4, 4)
    saliency[1, 2] = 1
    pixels = upsample(saliency, (40, 20))
    assert pixels.shape == (20, 40)
    y, x = divmod(int(pixels.argmax()), 40)
    assert (y // 5, x // 10) == (1, 2)
    assert points_into(pixels, (20, 5, 10, 5))
    assert not points_into(pixels, (0, 0, 20, 20))
    assert best_box(saliency, (40, 20)) == (20, 5, 10, 5)
    with pytest.raises(ValueError, match=r"saliency: must be a floating map \(rows, columns\)"):
        upsample(torch.zeros(1, 4, 4), (4, 4))


def test_what_a_map_says_of_a_thing() -> None:
    saliency = torch.zeros(4, 4)
    saliency[1, 1:3] = 1
    size, box = (40, 40), (10.0, 10.0, 20.0, 10.0)
    found = ground_thing(saliency, box, [], size)
    assert found == Grounded(right=True, points=True, area=0.125, by_chance=0)
    large = (0.0, 0.0, 40.0, 30.0)
    found = ground_thing(saliency, large, [], size)
    assert (found.right, found.points, found.area, found.by_chance) == (False, True, 0.75, 1)
    others = [(0.0, 20.0, 20.0, 20.0), (10.0, 10.0, 20.0, 12.0), (30.0, 0.0, 10.0, 10.0)]
    found = ground_thing(saliency, box, others, size)
    assert (found.right, found.by_chance) == (True, pytest.approx(1 / 3))
    assert not ground_thing(saliency, box, others[::2], size).right
    for flat in (torch.zeros(4, 4), torch.ones(4, 4)):
        for true in (large, others[0]):
            found = ground_thing(flat, true, others, size)
            assert not (found.right or found.points)


def test_shares_of_things() -> None:
    found = [
        Grounded(right=True, points=False, area=0.5, by_chance=0.25),
        Grounded(right=False, points=False, area=0.1, by_chance=0.5),
    ]
    shares = {"accuracy": 50, "chance": 37.5, "pointing": 0, "pointing_chance": 30}
    assert grounding_accuracies(found) == pytest.approx(shares)
    with pytest.raises(ValueError, match="must be of at least one reference, got none"):
        grounding_accuracies([])


def test_boxes_of_the_authors() -> None:
    """Their best boxes, scores, overlaps and accuracy, from their maps."""
    path = Path(__file__).parents[3] / "golden" / "albef" / "retrieval"
    with np.load(path.with_suffix(".npz")) as file:
        given = {key: torch.from_numpy(file[key]) for key in file if "/gradcam/" in key}
    height, width = given["in/gradcam/image_size"].tolist()
    boxes = [parse_box(box) for box in given["in/gradcam/boxes"].tolist()]
    true = [parse_box(box) for box in given["in/gradcam/true_boxes"].tolist()]
    found = []
    for k, saliency in enumerate(given["out/gradcam/itm_map"]):
        pixels = upsample(saliency, (width, height))
        best = best_detection(pixels, boxes)
        assert best == tuple(given["out/gradcam/best_box"][k].tolist())
        score = float(box_scores(pixels, [best])[0])
        assert score == pytest.approx(float(given["out/gradcam/best_score"][k]), rel=1e-5)
        overlap = float(given["out/gradcam/iou"][k])
        assert box_iou(best, true[k]) == pytest.approx(overlap, rel=1e-6)
        found.append(ground_thing(saliency, true[k], boxes, (width, height)))
    theirs = json.loads(path.with_suffix(".json").read_text())["grounding_accuracy"]
    assert [100.0 * one.right for one in found] == list(theirs.values())

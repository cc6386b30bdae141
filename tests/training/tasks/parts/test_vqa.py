"""VQA's accuracy against its definition, person by person, and what counts as the same answer."""

import itertools
from collections import Counter

import pytest

from svitt_ops.training.tasks.parts.vqa import best_constant, normalize_answer, vqa_accuracy


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Two", "2"),
        ("none", "0"),
        ("The  Dog", "dog"),
        ("a", ""),
        ("yes.", "yes"),
        ("3.5", "3.5"),
        ("1,000", "1000"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("what?!", "what"),
        ("dont know", "don't know"),
        ("it's", "it's"),
        ("oclock", "o'clock"),
        ("anteater", "anteater"),
        ("\tten\nmen ", "10 men"),
    ],
)
def test_what_is_the_same_answer(text: str, wanted: str) -> None:
    assert normalize_answer(text) == wanted
    assert normalize_answer(normalize_answer(text)) == wanted


@pytest.mark.parametrize("people", [4, 10])
def test_everyone_is_left_out_once(people: int) -> None:
    for right in range(people + 1):
        answers = ["yes"] * right + ["no"] * (people - right)
        sets = [answers[:k] + answers[k + 1 :] for k in range(people)]
        wanted = sum(min(1, others.count("yes") / 3) for others in sets) / people
        assert vqa_accuracy("Yes!", Counter(answers)) == pytest.approx(wanted, abs=1e-12)


def test_what_ten_people_say() -> None:
    found = [vqa_accuracy("2", {"2": c, "3": 10 - c}) for c in range(11)]
    wanted = [0, 0.3, 0.6, 0.9, *[1] * 7]
    assert found == pytest.approx(wanted, abs=1e-12)
    # Words and digits are one answer: two and two of ten.
    assert vqa_accuracy("2", {"two": 2, "2": 2, "3": 6}) == 1
    assert vqa_accuracy("4", {"two": 2, "2": 2, "3": 6}) == 0


def test_the_best_constant_answer() -> None:
    given = [{"yes": 10}, {"no": 7, "yes": 3}, {"red": 10}, {"Red": 2, "blue": 8}]
    answer, accuracy = best_constant(given)
    every = itertools.chain(*given)
    scores = {a: sum(vqa_accuracy(a, g) for g in given) / 4 for a in every}
    assert accuracy == max(scores.values()) == pytest.approx((1 + 0.9) / 4)
    assert answer == "yes"


def test_too_few_people() -> None:
    with pytest.raises(ValueError, match=r"vqa: .* at least 4 people, got 3"):
        vqa_accuracy("yes", {"yes": 3})
    with pytest.raises(ValueError, match="needs a question, got none"):
        best_constant([])

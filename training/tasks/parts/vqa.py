"""VQA's official accuracy: an answer is as right as people agree on it.

Source: Antol et al., VQA (ICCV 2015), section 3, and the challenge's evaluation: of the n people
who answered (ten in VQA), each is left out once; min(1, those of the others who say so / 3) is
averaged over these n sets. Answers are compared without articles and punctuation, numbers as
digits.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

ENOUGH = 3
"""People who say so besides oneself, for an answer to be wholly right."""
LEAST = ENOUGH + 1
"""People of whom a unanimous answer is wholly right."""
ARTICLES = {"a", "an", "the"}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must ought sha should was were wo"
    " would",
    "'ve": "could i might must should they we what who would you",
    "'d": "how it that there they where who you",
    "'s": "he how let somebody someone something that there what when where who why",
    "'ll": "it somebody someone they what who you",
    "'re": "there they what you",
    "'m": "i",
    "": "ma'am o'clock y'all 'twas",
}
CONTRACTIONS = {
    f"{word}{ending}".replace("'", ""): f"{word}{ending}"
    for ending, words in ENDINGS.items()
    for word in words.split()
}
"""Contractions by how they are written without an apostrophe."""


def normalize_answer(text: str) -> str:
    """An answer as the official evaluation compares it.

    A sign is deleted where it stands beside a space, or where a comma stands between digits;
    otherwise it becomes a space. Points that begin no decimals are deleted.
    """
    text = " ".join(text.split())
    thousands = re.search(r"\d,\d", text) is not None
    found = text
    for sign in PUNCTUATION:
        beside = f"{sign} " in text or f" {sign}" in text
        found = found.replace(sign, "" if beside or thousands else " ")
    found = re.sub(r"\.(?!\d)", "", found)
    words = [DIGITS.get(word, word) for word in found.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, given: Mapping[str, int]) -> float:
    """Official accuracy of an answer, from 0 to 1.

    With c of n people saying so: (c min(1, (c - 1) / 3) + (n - c) min(1, c / 3)) / n.

    Args:
        answer: what a model says.
        given: how many people gave each answer.

    Raises:
        ValueError: fewer than four people answered, so that nothing can be wholly right.
    """
    return _accuracies(given).get(normalize_answer(answer), 0.0)


def best_constant(given: Sequence[Mapping[str, int]]) -> tuple[str, float]:
    """The answer that is best for all questions, normalized, and its mean accuracy, 0 to 1.

    Args:
        given: for each question, how many people gave each answer.
    """
    sums: defaultdict[str, float] = defaultdict(float)
    for answers in given:
        for answer, accuracy in _accuracies(answers).items():
            sums[answer] += accuracy
    if not sums:
        raise ValueError("vqa: the best constant answer needs a question, got none")
    best = max(sums, key=lambda answer: (sums[answer], answer))
    return best, sums[best] / len(given)


def _accuracies(given: Mapping[str, int]) -> dict[str, float]:
    """The accuracy of every answer that was given."""
    counts: Counter[str] = Counter()
    for answer, count in given.items():
        counts[normalize_answer(answer)] += count
    people = counts.total()
    if people < LEAST:
        raise ValueError(
            f"vqa: a question must have the answers of at least {LEAST} people, got {people}"
        )
    return {
        answer: (c * min(1, (c - 1) / ENOUGH) + (people - c) * min(1, c / ENOUGH)) / people
        for answer, c in counts.items()
    }

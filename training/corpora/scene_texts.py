"""What is said of scenes: captions, questions, statements, hypotheses, referring expressions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.random import Generator

from svitt_ops.training.corpora.scenes import COLORS, OPPOSITE, SHAPES, Scene, Thing

SIDE_WORDS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
NUMBERS = {"0": "none", "1": "one", "2": "two", "3": "three"}
"""Numbers as some people write them."""
TYPES = ("color", "shape", "count", "relation", "yes/no")
"""Of questions; of every picture there is one of each."""
ANSWERS: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "count": tuple(NUMBERS),
    "relation": tuple(OPPOSITE),
    "yes/no": ("yes", "no"),
}
ANSWER_TYPES = {"count": "number", "yes/no": "yes/no"}
"""VQAv2's names of kinds of answers; all others are "other"."""
PEOPLE = 10
"""Who answer each question."""
CARELESS = (0, 0, 1, 2, 3)
"""How many of them may answer something else."""
CAPTIONS, QUESTIONS, EXPRESSIONS = 1, 2, 3  # what `Scene.random` is asked for
STATEMENTS = (*["shows"] * 3, *["any"] * 2, *["both"] * 2, "one", "total", "more", "side")
"""What is said of pairs of pictures, each as often as it stands here."""
SENTENCES = 200  # tries to find other pictures for a statement


def captions(scene: Scene, count: int) -> list[str]:
    """Texts that name all things: in turn where they are, and how large."""
    rng = scene.random(CAPTIONS)
    texts = []
    for number in range(count):
        first, second, *rest = (scene.things[k] for k in rng.permutation(len(scene.things)))
        if number % 2:
            named = [f"a {thing.size} {_name(thing)}" for thing in (first, second, *rest)]
            text = f"{', '.join(named[:-1])} and {named[-1]}"
        else:
            text = f"a {_name(first)} {_where(first, second)} a {_name(second)}"
            for third in rest:
                text += f", and a {_name(third)} {_where(third, first)} the {_name(first)}"
        texts.append(f"{text[0].upper()}{text[1:]}.")
    return texts


def questions(scene: Scene) -> list[dict[str, Any]]:
    """A question of each of `TYPES`, in VQAv2's fields without the picture's.

    `answer` has what ten people said, `question_id` is 10 times the scene's number and more.
    """
    rng = scene.random(QUESTIONS)
    lone = [_lone(rng, scene, words) for words in (SHAPES, COLORS)]
    asked = {
        "color": (f"What color is the {_noun(lone[0].shape)}?", lone[0].color),
        "shape": (f"What shape is the {_noun(lone[1].color)}?", lone[1].shape),
        "count": _ask_count(rng, scene),
        "relation": _ask_side(rng, scene),
        "yes/no": _ask_whether(rng, scene, bool(scene.number // 2 % 2)),
    }
    return [
        {
            "question": question,
            "question_id": 10 * scene.number + number,
            "answer": _given(rng, kind, answer),
            "question_type": kind,
            "answer_type": ANSWER_TYPES.get(kind, "other"),
        }
        for number, (kind, (question, answer)) in enumerate(asked.items())
    ]


def expressions(scene: Scene) -> list[tuple[str, Thing]]:
    """For each thing, words that are true of it alone and say nothing of where it is."""
    rng = scene.random(EXPRESSIONS)
    found = []
    for thing in scene.things:
        choices = []
        for shown in itertools.product((False, True), repeat=3):
            words = itertools.compress((thing.size, thing.color, thing.shape), shown)
            said = set(words)
            like = [t for t in scene.things if said <= {t.size, t.color, t.shape}]
            if said and len(like) == 1:
                size, color, shape = shown
                text = [thing.size] * size + [thing.color] * color
                choices.append(" ".join([*text, thing.shape if shape else "object"]))
        found.append((f"the {rng.choice(choices)}", thing))
    return found


@dataclass(frozen=True)
class Statement:
    """What is true of some pairs of pictures."""

    text: str
    holds: Callable[[Scene, Scene], bool]


def statements(rng: Generator, scenes: Sequence[Scene], count: int) -> Iterator[dict[str, Any]]:
    """Statements about pairs of pictures, in NLVR2's fields.

    Each is said of two pairs that differ in one picture: it is true of one pair and false of the
    other, so the text tells nothing, nor does the picture that both pairs have.

    Args:
        rng: draws them.
        scenes: at least two.
        count: of statements; there are twice as many entries.
    """
    made = 0
    while made < count:
        pair = [scenes[k] for k in rng.choice(len(scenes), 2, replace=False)]
        statement = _state(rng, *pair)
        truth = statement.holds(*pair)
        place = int(rng.integers(2))
        for number in rng.integers(len(scenes), size=SENTENCES):
            other = list(pair)
            other[place] = scenes[number]
            if other[0] is not other[1] and statement.holds(*other) != truth:
                break
        else:
            continue
        for about, label in ((pair, truth), (other, not truth)):
            images = [scene.file for scene in about]
            yield {"images": images, "sentence": statement.text, "label": str(label)}
        made += 1


def hypotheses(rng: Generator, scenes: Sequence[Scene]) -> Iterator[dict[str, Any]]:
    """Three entries for each scene, in SNLI-VE's fields: a hypothesis with each label.

    The hypothesis says that a thing is there, or that it isn't. Where a crate stands in the picture
    what cannot be seen may be under it: neither is then entailed. Each hypothesis comes with all
    three labels, so that it tells nothing by itself.
    """
    for number, scene in enumerate(scenes):
        thing = scene.in_sight[rng.integers(len(scene.in_sight))]
        order = rng.permutation(len(scenes))
        others = [scenes[k] for k in order]
        hiding = next((s for s in others if not _shows(s.in_sight, thing)), None)
        lacking = next((s for s in others if not _shows(s.things, thing)), None)
        if hiding is None or lacking is None:  # every picture shows such a thing
            continue
        pictures = (scene.crated_file, hiding.crated_file, lacking.file)
        text, labels = f"There is a {_name(thing)}.", ("entailment", "neutral", "contradiction")
        if number // 2 % 2:
            text, labels = f"There is no {_name(thing)}.", labels[::-1]
        for picture, label in zip(pictures, labels, strict=True):
            yield {"image": picture.rpartition(".")[0], "sentence": text, "label": label}


def classes(scene: Scene) -> list[str]:
    """What there is in a scene, in the order of the alphabet: "blue cross", "red square"."""
    return sorted({_name(thing) for thing in scene.things})


def similar_texts(rng: Generator, scenes: Sequence[Scene]) -> Iterator[dict[str, Any]]:
    """Three entries for each scene, in STS's fields: its caption beside another one.

    The other is about the same scene in other words, about the one with most things in common, and
    about any. The score is 5 times the things that both scenes have, over those that either has.
    """
    for scene in scenes:
        own = set(classes(scene))
        others = [scenes[k] for k in rng.permutation(len(scenes)) if scenes[k] is not scene]
        alike = max(others, key=lambda other: len(own & set(classes(other))))
        text = captions(scene, 1)[0]
        for other in (scene, alike, others[0]):
            told = set(classes(other))
            score = round(5 * len(own & told) / len(own | told), 2)
            yield {"sentence1": text, "sentence2": captions(other, 2)[1], "score": score}


def _name(thing: Thing) -> str:
    return f"{thing.color} {thing.shape}"


def _noun(word: str, *, several: bool = False) -> str:
    """A noun for a colour, a shape or "object"."""
    noun = f"{word} object" if word in COLORS else word
    return noun + ("es" if noun.endswith("s") else "s") * several


def _where(thing: Thing, other: Thing) -> str:
    return SIDE_WORDS[thing.side_of(other)]


def _shows(things: Sequence[Thing], wanted: Thing) -> bool:
    return any(thing.look == wanted.look for thing in things)


def _lone(rng: Generator, scene: Scene, words: Sequence[str] | Mapping[str, Any]) -> Thing:
    """A thing whose word of some is that of no other thing."""
    lone = [t for t in scene.things if any(t.is_a(w) and scene.count(w) == 1 for w in words)]
    return lone[rng.integers(len(lone))]


def _ask_count(rng: Generator, scene: Scene) -> tuple[str, str]:
    """How many there are of something: each number that can be is as likely."""
    words: dict[int, list[str]] = {}
    for word in (*COLORS, *SHAPES, "object"):
        words.setdefault(scene.count(word), []).append(word)
    number = int(rng.choice(sorted(words)))
    word = str(rng.choice(words[number]))
    return f"How many {_noun(word, several=True)} are there?", str(number)


def _ask_side(rng: Generator, scene: Scene) -> tuple[str, str]:
    first, second = _two(rng, scene)
    question = f"On which side of the {_name(second)} is the {_name(first)}?"
    return question, first.side_of(second)


def _ask_whether(rng: Generator, scene: Scene, truth: bool) -> tuple[str, str]:
    answer = "yes" if truth else "no"
    first, second = _two(rng, scene)
    if rng.integers(2):
        side = first.side_of(second)
        said = SIDE_WORDS[side if truth else OPPOSITE[side]]
        return f"Is the {_name(first)} {said} the {_name(second)}?", answer
    look = first.look
    if not truth:  # of a colour and of a shape that are there, but not together
        looks = {thing.look for thing in scene.things}
        colors, shapes = zip(*sorted(looks), strict=True)
        missing = sorted(set(itertools.product(colors, shapes)) - looks)
        look = missing[rng.integers(len(missing))]
    return f"Is there a {' '.join(look)}?", answer


def _two(rng: Generator, scene: Scene) -> tuple[Thing, Thing]:
    first, second = rng.choice(len(scene.things), 2, replace=False)
    return scene.things[first], scene.things[second]


def _given(rng: Generator, kind: str, right: str) -> list[str]:
    """What people answer: most the right thing, some of them in other words."""
    others = [answer for answer in ANSWERS[kind] if answer != right]
    wrong = rng.choice(others, int(rng.choice(CARELESS))).tolist()
    answers = [right] * (PEOPLE - len(wrong)) + wrong
    if kind == "count":
        spelled = rng.random(PEOPLE) < 0.2
        answers = [
            NUMBERS[answer] if out else answer for answer, out in zip(answers, spelled, strict=True)
        ]
    return [answers[k] for k in rng.permutation(PEOPLE)]


def _state(rng: Generator, left: Scene, right: Scene) -> Statement:
    """A statement that these pictures suggest; it may be false of them."""
    place = int(rng.integers(2))
    thing = (left, right)[place].things[0]
    word = str(rng.choice([thing.color, thing.shape]))
    noun, nouns = _noun(word), _noun(word, several=True)
    kind = str(rng.choice(STATEMENTS))
    if kind == "shows":
        return Statement(
            f"The {('left', 'right')[place]} image shows a {_name(thing)}.",
            lambda *pair: _shows(pair[place].things, thing),
        )
    if kind == "any":
        return Statement(
            f"At least one of the images shows a {_name(thing)}.",
            lambda *pair: any(_shows(s.things, thing) for s in pair),
        )
    if kind == "both":
        return Statement(
            f"Both images show a {noun}.", lambda a, b: bool(a.count(word) and b.count(word))
        )
    if kind == "one":
        return Statement(
            f"Exactly one of the images shows a {noun}.",
            lambda a, b: bool(a.count(word)) != bool(b.count(word)),
        )
    if kind == "total":
        total = left.count(word) + right.count(word)
        return Statement(
            f"There are {total} {nouns} in total."
            if total > 1
            else f"There is one {noun} in total.",
            lambda a, b: a.count(word) + b.count(word) == total,
        )
    if kind == "more":
        word = str(rng.choice([word, "object"]))
        return Statement(
            f"The left image shows more {_noun(word, several=True)} than the right image.",
            lambda a, b: a.count(word) > b.count(word),
        )
    first, second = _two(rng, (left, right)[rng.integers(2)])
    side = first.side_of(second)
    return Statement(
        f"In one of the images a {_noun(first.color)} is {SIDE_WORDS[side]} a {second.shape}.",
        lambda *pair: any(_shows_side(s, first.color, side, second.shape) for s in pair),
    )


def _shows_side(scene: Scene, color: str, side: str, shape: str) -> bool:
    """Whether a thing of a colour is on a side of another one of a shape."""
    return any(
        one.color == color and other.shape == shape and one.side_of(other) == side
        for one, other in itertools.permutations(scene.things, 2)
    )

"""Sentences that describe a scene: the many wordings used in training, and some that only tests use."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from deployments.training.shapes.scene import BACKGROUNDS, COLORS, SHAPES, SIDE_BY_SIDE, Scene, Thing

Choice = TypeVar("Choice")

DEFAULT_PLACE = "center"
"""Place of the only shape of a prompt that names none."""
DEFAULT_BACKGROUND = "white"
RELATIONS: dict[tuple[str, ...], tuple[str, ...]] = {
    SIDE_BY_SIDE: ("and", "and", "and", ",", "next to", "beside", "left of", "to the left of"),
    ("right", "left"): ("right of", "to the right of"),
    ("top", "bottom"): ("above", "over"),
    ("bottom", "top"): ("below", "under"),
}
"""Words between two shapes that say, by the order of the shapes, at which places they are. So a prompt that says
nothing of places has its first shape on the left."""
_RELATED_SHARE = 0.5
"""Share of sentences that use such words, if the shapes are at such places."""

OPENINGS = (
    "",
    "",
    "",
    "draw ",
    "please draw ",
    "paint ",
    "show ",
    "there is ",
    "a picture of ",
    "a drawing of ",
    "an image of ",
)
PLACE_PHRASES = {
    "left": ("on the left", "at the left", "on the left side", "to the left"),
    "right": ("on the right", "at the right", "on the right side", "to the right"),
    "top": ("at the top", "on the top", "on top", "near the top"),
    "bottom": ("at the bottom", "on the bottom", "near the bottom", "below"),
    "center": ("in the center", "in the middle", "at the center", "in the centre"),
}
LABELS = {
    "left": ("left",),
    "right": ("right",),
    "top": ("top",),
    "bottom": ("bottom",),
    "center": ("center", "middle"),
}
SIZE_WORDS = {"small": ("small", "small", "tiny", "little"), "large": ("", "", "large", "big")}
BACKGROUND_PHRASES = (
    "on a {} background",
    "on a {} background",
    "on {}",
    "against a {} background",
    "with a {} background",
    "{} background",
    "background: {}",
    "the background is {}",
)
BACKGROUND_WORDS = {name: (name,) for name in BACKGROUNDS} | {"gray": ("gray", "gray", "grey")}
BREAKS = (", ", ", ", " ", "; ", ". ")
CASES: tuple[Callable[[str], str], ...] = (*(str,) * 16, *(str.capitalize,) * 4, str.title, str.upper)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """Returns a sentence for `scene` as used in training: terse or wordy, sometimes with an unrelated word."""
    things = _shuffled(scene.things, rng)
    relations = RELATIONS.get(tuple(thing.place for thing in things))
    is_related = relations is not None and rng.random() < _RELATED_SHARE
    style = rng.random()
    if relations is not None and is_related:  # a red circle above a blue square, on white
        said = _pick(rng, OPENINGS) + _related(things, _pick(rng, relations), rng)
        sentence = _with_background(said, scene.background, rng)
    elif style < 0.15:  # left: a small red circle; background: white
        parts = [f"{_pick(rng, LABELS[t.place])}: {_noun(t, rng)}" for t in things]
        said = _pick(rng, BACKGROUND_WORDS[scene.background])
        sentence = "; ".join([*parts, _pick(rng, ("background: {}", "{} background")).format(said)])
    elif style < 0.30:  # small red circle, left; blue square, right; on white
        parts = [f"{_noun(t, rng)}, {_pick(rng, LABELS[t.place])}" for t in things]
        sentence = _with_background("; ".join(parts), scene.background, rng)
    elif style < 0.45:  # on the left a red circle and on the right a blue square, on a white background
        parts = [f"{_pick(rng, PLACE_PHRASES[t.place])} {_noun(t, rng)}" for t in things]
        sentence = _with_background(_pick(rng, (" and ", ", ")).join(parts), scene.background, rng)
    else:
        parts = [_placed(t, rng, len(things) == 1) for t in things]
        said = _pick(rng, OPENINGS) + _pick(rng, (" and ", " and ", ", ", ", and ")).join(parts)
        sentence = _with_background(said, scene.background, rng)
    if rng.random() < 0.15:
        sentence = _with_stray_words(sentence, rng)
    return _pick(rng, CASES)(sentence)


def describe_unseen(scene: Scene, rng: np.random.Generator) -> str:
    """Returns a sentence for `scene` in a wording that `describe` never gives; it always names size and place."""
    nouns = [_article(f"{t.size} {t.color} {t.shape}") for t in scene.things]
    wheres = [PLACE_PHRASES[t.place][0] for t in scene.things]
    placed = [f"{noun} {where}" for noun, where in zip(nouns, wheres, strict=True)]
    labelled = [f"{t.size} {t.color} {t.shape}, {LABELS[t.place][0]}" for t in scene.things]
    background = scene.background
    return _pick(
        rng,
        (
            f"Could you please paint {' and '.join(placed)}? The background is {background}.",
            f"I want to see {' and '.join(placed)}, all on a {background} background",
            f"background {background}; {'; '.join(labelled)}",
            f"{background.capitalize()} background, with {' and also '.join(placed)}.",
            f"show me a drawing: {', '.join(placed)}, {background} background",
            f"a {background} picture with {' and '.join(placed)}",
        ),
    )


def describe_without_places(scene: Scene, rng: np.random.Generator) -> str:
    """Returns a sentence that `describe` never gives, for two shapes `SIDE_BY_SIDE`; it says nothing of places."""
    first, second = (_article(f"{t.size} {t.color} {t.shape}") for t in scene.things)
    background = scene.background
    return _pick(
        rng,
        (
            f"Could you please paint {first} and {second}? The background is {background}.",
            f"I want to see {first} next to {second}, all on a {background} background",
            f"{background.capitalize()} background, with {first} and also {second}.",
            f"show me a drawing: {first}, {second}, {background} background",
            f"a {background} picture with {first} and {second}",
        ),
    )


def vocabulary() -> list[str]:
    """Returns every word and mark that `describe` can use, in lower case and sorted, without unrelated words."""
    texts = [*OPENINGS, *BACKGROUND_PHRASES, *COLORS, *SHAPES, "a an one and with background :;,."]
    for phrases in (PLACE_PHRASES, LABELS, SIZE_WORDS, BACKGROUND_WORDS, RELATIONS):
        texts += [phrase for options in phrases.values() for phrase in options]
    spaced = " ".join(texts).replace("{}", " ")
    for mark in ":;,.":
        spaced = spaced.replace(mark, f" {mark} ")
    return sorted(set(spaced.split()))


def _noun(thing: Thing, rng: np.random.Generator) -> str:
    said = " ".join(filter(None, (_pick(rng, SIZE_WORDS[thing.size]), thing.color, thing.shape)))
    return said if rng.random() < 0.2 else _article(said)


def _placed(thing: Thing, rng: np.random.Generator, is_alone: bool) -> str:
    if is_alone and thing.place == DEFAULT_PLACE and rng.random() < 0.4:
        return _noun(thing, rng)
    return f"{_noun(thing, rng)} {_pick(rng, PLACE_PHRASES[thing.place])}"


def _related(things: Sequence[Thing], relation: str, rng: np.random.Generator) -> str:
    first, second = (_noun(thing, rng) for thing in things)
    return f"{first}{relation} {second}" if relation == "," else f"{first} {relation} {second}"


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _with_background(said: str, background: str, rng: np.random.Generator) -> str:
    """Returns the sentence with the background last, or first, or not at all if it is the default."""
    where = rng.random()
    if background == DEFAULT_BACKGROUND and where < 0.25:
        return said
    phrase = _pick(rng, BACKGROUND_PHRASES).format(_pick(rng, BACKGROUND_WORDS[background]))
    if where > 0.8:
        return f"{phrase}{_pick(rng, (', ', ': ', ' '))}{said}"
    return f"{said}{_pick(rng, BREAKS)}{phrase}{_pick(rng, ('', '', '.'))}"


def _with_stray_words(sentence: str, rng: np.random.Generator) -> str:
    words = sentence.split(" ")
    for _ in range(int(rng.integers(1, 4))):
        stray = "".join(_pick(rng, LETTERS) for _ in range(int(rng.integers(2, 9))))
        words.insert(int(rng.integers(len(words) + 1)), stray)
    return " ".join(words)


def _shuffled(things: Sequence[Thing], rng: np.random.Generator) -> list[Thing]:
    return [things[int(index)] for index in rng.permutation(len(things))]


def _pick(rng: np.random.Generator, choices: Sequence[Choice]) -> Choice:
    return choices[int(rng.integers(len(choices)))]

"""Scenes that the `shapes` model can draw, one or two coloured shapes at named places, and their true images."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rgb = tuple[int, int, int]
Pixels = NDArray[np.uint8]
"""[H, W, 3]."""
Offsets = NDArray[np.float64]
"""[H, W], in pixels."""

COLORS: dict[str, Rgb] = {
    "red": (220, 40, 40),
    "orange": (245, 130, 30),
    "yellow": (245, 205, 40),
    "green": (40, 165, 70),
    "blue": (45, 90, 220),
    "purple": (125, 35, 170),
    "black": (25, 25, 25),
}
BACKGROUNDS: dict[str, Rgb] = {
    "white": (245, 245, 245),
    "gray": (150, 150, 150),
    "pink": (250, 190, 205),
    "cyan": (170, 235, 240),
}
SHAPES = ("circle", "square", "triangle")
PLACES: dict[str, tuple[float, float]] = {
    "left": (0.25, 0.5),
    "right": (0.75, 0.5),
    "top": (0.5, 0.25),
    "bottom": (0.5, 0.75),
    "center": (0.5, 0.5),
}
"""Centre (x, y) as fractions of width and height."""
SIZES: dict[str, float] = {"small": 0.095, "large": 0.18}
"""Radius as a fraction of the shorter side. A prompt that names no size means large."""
OPPOSITE = (frozenset({"left", "right"}), frozenset({"top", "bottom"}))

SIDE_BY_SIDE = ("left", "right")
"""Places of two shapes, in the order in which a prompt names them, if it says nothing of places."""
SIDE_BY_SIDE_SHARE = 0.3
"""Share of such scenes among those of two shapes."""
PLACE_JITTER = 0.02
"""Largest random shift of a shape, as a fraction of width or height."""
SIZE_JITTER = 0.06
"""Largest random change of a shape's radius, as a fraction of it."""
HELD_OUT_SHARE = 10
"""One of this many scenes is never trained on."""


@dataclass(frozen=True)
class Thing:
    """One coloured shape."""

    color: str
    shape: str
    place: str
    size: str


@dataclass(frozen=True)
class Scene:
    """One shape, or two at different places. Neighbouring shapes are small, so that they never touch."""

    things: tuple[Thing, ...]
    background: str

    @property
    def is_held_out(self) -> bool:
        """Whether training never sees this scene, in whichever order its shapes are named."""
        things = sorted(repr(thing) for thing in self.things)
        digest = hashlib.sha256(repr((things, self.background)).encode()).digest()
        return int.from_bytes(digest[:4]) % HELD_OUT_SHARE == 0


def random_scene(rng: np.random.Generator, *, is_held_out: bool) -> Scene:
    """Returns a scene that training sees or never sees; 55 % of scenes have two shapes."""
    while True:
        count = 1 + int(rng.random() < 0.55)
        places = [str(place) for place in rng.choice(list(PLACES), count, replace=False)]
        if count == 2 and rng.random() < SIDE_BY_SIDE_SHARE:
            places = list(SIDE_BY_SIDE)
        sizes = list(SIZES) if count == 1 or frozenset(places) in OPPOSITE else ["small"]
        things = tuple(
            Thing(_pick(rng, list(COLORS)), _pick(rng, SHAPES), place, _pick(rng, sizes)) for place in places
        )
        scene = Scene(things, _pick(rng, list(BACKGROUNDS)))
        if scene.is_held_out == is_held_out:
            return scene


def render_scene(scene: Scene, width: int, height: int, rng: np.random.Generator | None = None) -> Pixels:
    """Returns the scene's image. With `rng`, places and sizes vary a little: the autoencoder must know more
    than the transformer draws."""
    draw = rng.uniform if rng is not None else lambda low, high: 0.0
    placed = []
    for thing in scene.things:
        x, y = PLACES[thing.place]
        x += draw(-PLACE_JITTER, PLACE_JITTER)
        y += draw(-PLACE_JITTER, PLACE_JITTER)
        radius = SIZES[thing.size] * min(width, height) * (1 + draw(-SIZE_JITTER, SIZE_JITTER))
        placed.append((thing.shape, COLORS[thing.color], x * width, y * height, radius))
    return paint(placed, BACKGROUNDS[scene.background], width, height)


def paint(
    shapes: Sequence[tuple[str, Rgb, float, float, float]], background: Rgb, width: int, height: int
) -> Pixels:
    """Draws shapes (shape, colour, x, y, radius in pixels) in order, with edges smoothed over one pixel."""
    image = np.empty((height, width, 3), np.float32)
    image[:] = background
    for shape, color, x, y, radius in shapes:
        left, right = (min(max(round(x + side * (radius + 2)), 0), width) for side in (-1, 1))
        top, bottom = (min(max(round(y + side * (radius + 2)), 0), height) for side in (-1, 1))
        dy, dx = np.mgrid[top:bottom, left:right] + 0.5
        coverage = np.clip(0.5 - _distance(shape, dx - x, dy - y, radius), 0, 1)[..., None]
        window = image[top:bottom, left:right]
        window += coverage * (np.asarray(color, np.float32) - window)
    return np.rint(image).astype(np.uint8)


def _distance(shape: str, dx: Offsets, dy: Offsets, radius: float) -> Offsets:
    """Returns the distance from the outline in pixels, negative inside. All three shapes look similarly large."""
    distance: Offsets
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - 0.88 * radius
    else:
        rise, run = 1.85 * radius, radius  # apex at -radius, base at 0.85 radius, as wide as a circle
        sides = (rise * np.abs(dx) - run * (dy + radius)) / np.hypot(rise, run)
        distance = np.maximum(sides, dy - 0.85 * radius)
    return distance


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]

"""Judges a picture of coloured shapes by plain pixel arithmetic; imports no model and no torch.

What differs from the background is a shape; its colour is its median's nearest name, its place is where its box
is centred, its outline is told by its box: a triangle has a quarter of itself in the upper half, a circle fills
pi / 4 of it, a square all.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deployments.checkpoints.shapes.scene import BACKGROUNDS, COLORS, PLACES, SIZES, Scene, Thing

Mask = NDArray[np.bool_]

FRAME = 3
"""Pixels at the border that always show the background."""
PLACE_TOLERANCE = 0.09
"""Of width and height; neighbouring places are 0.25 apart."""
COLOR_TOLERANCE = 60.0
"""How far from its name's colour, of 255 in red, green and blue together, a colour may be."""
MIN_FOUND_PIXELS = 12
"""Of 128 x 128; anything smaller is a speck."""
MAX_TRIANGLE_TOP = 0.375
"""Half way between a triangle's quarter and the half of the others."""
MIN_SQUARE_FILL = 0.89
"""Half way between a circle's pi / 4 and a square's 1."""


@dataclass(frozen=True)
class Found:
    """One shape in a picture; a colour that is no name's is `?`."""

    color: str
    shape: str
    x: float
    y: float
    size: str


@dataclass(frozen=True)
class Grade:
    """What of the scene is right. A shape too many or too few makes the place wrong."""

    color: bool
    place: bool
    shape: bool
    size: bool
    background: bool

    @property
    def is_right(self) -> bool:
        return self.color and self.place and self.shape and self.size and self.background


def grade(image: NDArray[np.uint8], scene: Scene) -> Grade:
    """Compares a picture [H, W, 3] with the scene that was asked for."""
    background, found = look(image)
    pairs = [(thing, _nearest(thing, found)) for thing in scene.things]
    return Grade(
        color=all(match is not None and match.color == thing.color for thing, match in pairs),
        place=len(found) == len(scene.things) and all(_is_at(thing, match) for thing, match in pairs),
        shape=all(match is not None and match.shape == thing.shape for thing, match in pairs),
        size=all(match is not None and match.size == thing.size for thing, match in pairs),
        background=background == scene.background,
    )


def look(image: NDArray[np.uint8]) -> tuple[str, list[Found]]:
    """The background's name, and every shape."""
    pixels = image.astype(np.float64)
    inner = pixels[FRAME:-FRAME, FRAME:-FRAME]
    frame = np.ones(pixels.shape[:2], bool)
    frame[FRAME:-FRAME, FRAME:-FRAME] = False
    ground = np.median(pixels[frame], axis=0)
    distance = np.linalg.norm(inner - ground, axis=-1)
    blobs = [blob for blob in _blobs(distance > 50) if blob.sum() >= MIN_FOUND_PIXELS]
    return _name(ground, BACKGROUNDS), [_describe(blob, inner, distance, image.shape) for blob in blobs]


def _describe(
    blob: Mask, inner: NDArray[np.float64], distance: NDArray[np.float64], shape: tuple[int, ...]
) -> Found:
    """Its outline is where it is half way from the background to its own colour."""
    color = np.median(inner[blob], axis=0)
    solid = blob & (distance > np.median(distance[blob]) / 2)
    rows, columns = np.flatnonzero(solid.any(axis=1)), np.flatnonzero(solid.any(axis=0))
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    top = solid[: (rows[0] + rows[-1] + 1) // 2].sum() / solid.sum()
    fill = solid.sum() / (height * width)
    radius = max(height, width) / 2 / min(shape[:2])
    return Found(
        color=_name(color, COLORS),
        shape="triangle" if top < MAX_TRIANGLE_TOP else "square" if fill > MIN_SQUARE_FILL else "circle",
        x=(columns[0] + columns[-1] + 1) / 2 / shape[1] + FRAME / shape[1],
        y=(rows[0] + rows[-1] + 1) / 2 / shape[0] + FRAME / shape[0],
        size=min(SIZES, key=lambda name: abs(SIZES[name] - radius)),
    )


def _blobs(mask: Mask) -> Iterator[Mask]:
    """Connected regions, one after the other."""
    left = mask.copy()
    while left.any():
        blob = np.zeros_like(left)
        blob[np.unravel_index(left.argmax(), left.shape)] = True
        while True:
            grown = blob.copy()
            for axis in (0, 1):
                for step in (-1, 1):
                    grown |= np.roll(blob, step, axis)  # the frame keeps shapes off the border
            grown &= left
            if (grown == blob).all():
                break
            blob = grown
        left &= ~blob
        yield blob


def _name(color: NDArray[np.float64], palette: dict[str, tuple[int, int, int]]) -> str:
    name = min(palette, key=lambda name: float(np.linalg.norm(color - palette[name])))
    return name if np.linalg.norm(color - palette[name]) < COLOR_TOLERANCE else "?"


def _nearest(thing: Thing, found: list[Found]) -> Found | None:
    x, y = PLACES[thing.place]
    return min(found, key=lambda other: np.hypot(other.x - x, other.y - y), default=None)


def _is_at(thing: Thing, found: Found | None) -> bool:
    x, y = PLACES[thing.place]
    return found is not None and max(abs(found.x - x), abs(found.y - y)) < PLACE_TOLERANCE

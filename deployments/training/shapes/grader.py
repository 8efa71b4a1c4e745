"""Judges an image of coloured shapes by plain pixel arithmetic; imports no model and no torch.

A region that differs from the background is a shape. Its colour is the name nearest to its median, and its place
is the centre of its bounding box. Its outline follows from the box: a triangle has a quarter of its area in the
upper half, a circle fills pi / 4 of the box, and a square all of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deployments.training.shapes.scene import BACKGROUNDS, COLORS, PLACES, SIZES, Scene, Thing, render_scene

Mask = NDArray[np.bool_]

FRAME = 3
"""Width of the border, in pixels, that always shows the background."""
PLACE_TOLERANCE = 0.09
"""As a fraction of width and height; neighbouring places are 0.25 apart."""
COLOR_TOLERANCE = 60.0
"""Largest distance between a colour and its name's colour, in red, green and blue from 0 to 255."""
MIN_FOUND_PIXELS = 12
"""Least pixels of a shape in 128 x 128; anything smaller is a speck."""
MAX_TRIANGLE_TOP = 0.375
"""Half way between a triangle's 1/4 of the area in the upper half and the others' 1/2."""
OVERLAP_MARGIN = 6
"""Width in pixels of the surroundings of a shape in which a drawn one may overlap it."""
MIN_SQUARE_FILL = 0.89
"""Half way between a circle's pi / 4 and a square's 1."""


@dataclass(frozen=True)
class Found:
    """One shape in an image. A colour without a name is `?`."""

    color: str
    shape: str
    x: float
    y: float
    size: str


@dataclass(frozen=True)
class Grade:
    """The properties of a scene that are right. A shape too many or too few makes the place wrong."""

    color: bool
    place: bool
    shape: bool
    size: bool
    background: bool

    @property
    def is_right(self) -> bool:
        return self.color and self.place and self.shape and self.size and self.background


def grade(image: NDArray[np.uint8], scene: Scene) -> Grade:
    """Compares an image [H, W, 3] with the requested scene."""
    background, found = look(image)
    pairs = [(thing, _nearest(thing, found)) for thing in scene.things]
    return Grade(
        color=all(match is not None and match.color == thing.color for thing, match in pairs),
        place=len(found) == len(scene.things) and all(_is_at(thing, match) for thing, match in pairs),
        shape=all(match is not None and match.shape == thing.shape for thing, match in pairs),
        size=all(match is not None and match.size == thing.size for thing, match in pairs),
        background=background == scene.background,
    )


def outline_overlap(image: NDArray[np.uint8], scene: Scene) -> float:
    """Returns how well the drawn outlines agree with the true ones: the least intersection over union of a shape.

    A pixel belongs to a shape if it is more than half of the way from the background's colour to the shape's.
    """
    height, width = image.shape[:2]
    overlaps = []
    for thing in scene.things:
        ground, color = np.array(BACKGROUNDS[scene.background], float), np.array(COLORS[thing.color], float)
        true = _covered(render_scene(Scene((thing,), scene.background), width, height), ground, color)
        rows, columns = np.flatnonzero(true.any(axis=1)), np.flatnonzero(true.any(axis=0))
        window = tuple(
            slice(max(found[0] - OVERLAP_MARGIN, 0), found[-1] + OVERLAP_MARGIN + 1) for found in (rows, columns)
        )
        drawn = _covered(image, ground, color)
        overlaps.append((drawn & true)[window].sum() / (drawn | true)[window].sum())
    return float(min(overlaps))


def _covered(image: NDArray[np.uint8], ground: NDArray[np.float64], color: NDArray[np.float64]) -> Mask:
    step = color - ground
    covered: Mask = (image - ground) @ step > 0.5 * step @ step
    return covered


def look(image: NDArray[np.uint8]) -> tuple[str, list[Found]]:
    """Returns the background's name, and every shape in the image."""
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
    """Describes one region. Its outline is where its colour is half way between the background and its own."""
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
    """Yields the connected regions of a mask."""
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

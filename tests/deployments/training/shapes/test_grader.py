"""The grader of images gives the right grades to known images."""

from dataclasses import replace

import numpy as np
import pytest

from deployments.training.shapes.grader import grade, look, outline_overlap
from deployments.training.shapes.scene import (
    BACKGROUNDS,
    COLORS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    random_scene,
    render_scene,
)

THING = Thing("red", "circle", "left", "large")
SCENE = Scene((THING, Thing("blue", "square", "right", "small")), "white")


@pytest.mark.parametrize("size", [(128, 128), (160, 96), (96, 160), (256, 256)])
def test_true_pictures_are_right_in_everything(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        scene = random_scene(rng, is_held_out=bool(rng.integers(2)))
        graded = grade(render_scene(scene, *size, rng), scene)
        assert graded.is_right, (scene, graded)


@pytest.mark.parametrize(
    ("aspect", "value"),
    [
        *(("color", color) for color in COLORS if color != THING.color),
        *(("shape", shape) for shape in SHAPES if shape != THING.shape),
        *(("place", place) for place in PLACES if place != THING.place),
        *(("size", size) for size in SIZES if size != THING.size),
    ],
)
def test_one_wrong_aspect_is_found_and_nothing_else(aspect: str, value: str) -> None:
    drawn = render_scene(Scene((replace(THING, **{aspect: value}),), "white"), 128, 128)
    graded = grade(drawn, Scene((THING,), "white"))
    wrong = {name for name in ("color", "place", "shape", "size", "background") if not getattr(graded, name)}
    assert wrong == {aspect}


@pytest.mark.parametrize("background", [name for name in BACKGROUNDS if name != "white"])
def test_a_wrong_background_is_found(background: str) -> None:
    graded = grade(render_scene(replace(SCENE, background=background), 128, 128), SCENE)
    assert not graded.background
    assert graded.color
    assert graded.place


def test_two_shapes_that_changed_places_are_wrong() -> None:
    left, right = SCENE.things
    swapped = Scene((replace(left, place="right"), replace(right, place="left")), "white")
    graded = grade(render_scene(swapped, 128, 128), SCENE)
    assert not graded.color
    assert not graded.shape


@pytest.mark.parametrize(
    "drawn", [(), SCENE.things[:1], (*SCENE.things, Thing("green", "circle", "top", "small"))]
)
def test_a_shape_too_few_or_too_many_makes_the_place_wrong(drawn: tuple[Thing, ...]) -> None:
    assert not grade(render_scene(Scene(drawn, "white"), 128, 128), SCENE).place


def test_a_muddy_color_has_no_name() -> None:
    picture = render_scene(Scene((THING,), "white"), 128, 128)
    picture[(picture == COLORS["red"]).all(axis=-1)] = (110, 70, 60)
    assert [found.color for found in look(picture)[1]] == ["?"]


def test_the_true_outlines_overlap_wholly() -> None:
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng, is_held_out=False) for _ in range(30)]
    assert [outline_overlap(render_scene(scene, 128, 128), scene) for scene in scenes] == [1.0] * 30


@pytest.mark.parametrize(
    ("change", "low", "high"),
    [({"size": "small"}, 0.2, 0.4), ({"place": "right"}, 0.0, 0.01), ({"shape": "square"}, 0.75, 0.9)],
)
def test_the_overlap_is_that_of_the_worst_shape(change: dict[str, str], low: float, high: float) -> None:
    other = Thing("blue", "square", "top", "small")
    drawn = Scene((replace(THING, **change), other), "white")
    assert low <= outline_overlap(render_scene(drawn, 128, 128), Scene((THING, other), "white")) <= high


def test_a_lump_of_the_right_size_overlaps_less() -> None:
    picture = render_scene(Scene((THING,), "white"), 128, 128)
    lump = np.roll(picture, 2, axis=1)
    assert 0.8 < outline_overlap(lump, Scene((THING,), "white")) < 0.92

"""The encoder's session of a request: equal texts and input images go to the same replica."""

from dataclasses import replace
from typing import Any

import pytest

from deployments.replica.encoder_session import encoder_session
from deployments.request import GenerationRequest, InputPictures, Prompt

REQUEST = GenerationRequest(Prompt("a cat", None, is_guided=False), 64, 64, 1, 4, None, None, 0, "png", 100, fps=8)
PICTURES = InputPictures(images=(b"a picture",))


@pytest.mark.parametrize("field", [{"seed": 1}, {"width": 128}, {"num_inference_steps": 9}, {"quality": "low"}])
def test_what_no_text_encoder_sees_makes_no_difference(field: dict[str, Any]) -> None:
    assert encoder_session(replace(REQUEST, **field)) == encoder_session(REQUEST)


@pytest.mark.parametrize(
    "prompt",
    [
        Prompt("a dog", None, is_guided=False),
        Prompt("\ud800", None, is_guided=False),
        Prompt("a cat", "", is_guided=False),
        Prompt("a cat", None, is_guided=True),
    ],
    ids=str,
)
def test_other_texts_are_of_another_session(prompt: Prompt) -> None:
    assert encoder_session(replace(REQUEST, prompt=prompt)) != encoder_session(REQUEST)


def test_other_kinds_of_call_are_of_another_session() -> None:
    assert encoder_session(replace(REQUEST, kind="edit")) != encoder_session(REQUEST)


def test_equal_pictures_are_of_one_session() -> None:
    again = InputPictures(images=(bytes(bytearray(b"a picture")),))
    assert encoder_session(REQUEST, again) == encoder_session(REQUEST, PICTURES)


@pytest.mark.parametrize(
    "pictures",
    [
        None,
        InputPictures(images=(b"a_picture",)),
        InputPictures(images=(b"another picture",)),
        InputPictures(images=(b"a picture", b"a picture")),
        InputPictures(images=(b"a picture",), mask=b"a mask"),
        InputPictures(images=(b"a picture",), control=b"edges"),
        InputPictures(video=b"a video"),
    ],
    ids=str,
)
def test_other_pictures_are_of_another_session(pictures: InputPictures | None) -> None:
    assert encoder_session(REQUEST, pictures) != encoder_session(REQUEST, PICTURES)

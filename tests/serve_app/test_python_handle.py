"""Tests of generation by a Python handle, as `serve.get_app_handle("relay")` returns it."""

import base64
from typing import Any

import pytest
from ray import serve

from deployments.answers import Progress
from serve_app.errors import BadRequest, UnknownModel
from serve_app.flow.events import Picture
from serve_app.flow.partials import PartialImage
from tests.keyed_app import ENDLESS

pytestmark = pytest.mark.slow

FIELDS = {"prompt": "a red fox", "seed": 21, "num_inference_steps": 5}


@pytest.fixture
def handle(flux_app: Any) -> Any:
    return serve.get_app_handle(flux_app.name)


def stream(handle: Any, **fields: Any) -> Any:
    return handle.options(stream=True).stream.remote(**fields)


def test_a_handle_gives_the_picture_that_http_gives(flux_app: Any, handle: Any) -> None:
    [picture] = handle.generate.remote(**FIELDS).result()
    [data] = flux_app.client.post("/v1/images/generations", json=FIELDS).json()["data"]
    assert picture.media.data == base64.b64decode(data["b64_json"])
    assert (picture.seed, picture.media.media_type) == (21, "image/png")
    assert picture.timings_ms.keys() == data["timings_ms"].keys()


def test_a_handle_gives_n_pictures_in_the_order_of_their_seeds(handle: Any) -> None:
    pictures = handle.generate.remote(**FIELDS, n=3).result()
    assert [picture.seed for picture in pictures] == [21, 22, 23]
    assert len({picture.media.data for picture in pictures}) == 3


def test_a_stream_tells_progress_before_the_pictures(handle: Any) -> None:
    events = list(stream(handle, **FIELDS, n=2))
    for i in range(2):
        *progress, picture = [event.payload for event in events if event.index == i]
        assert all(isinstance(payload, Progress) and payload.num_steps == 5 for payload in progress)
        steps = [payload.step for payload in progress]
        assert steps == sorted(steps)
        assert (steps[0], steps[-1], progress[-1].phase) == (0, 5, "decode")
        assert picture.seed == 21 + i


def test_a_stream_ends_with_the_picture_that_generate_gives(handle: Any) -> None:
    *_, last = stream(handle, **FIELDS)
    [picture] = handle.generate.remote(**FIELDS).result()
    assert isinstance(last.payload, Picture)
    assert last.payload.media.data == picture.media.data


def test_a_stream_gives_partial_pictures_when_asked(handle: Any) -> None:
    events = stream(handle, **FIELDS | {"num_inference_steps": 48}, partial_images=2, progress=False)
    *partials, picture = [event.payload for event in events]
    assert isinstance(picture, Picture)
    assert [(type(payload), payload.partial_image_index) for payload in partials] == [
        (PartialImage, 0),
        (PartialImage, 1),
    ]


def test_a_videos_stream_tells_progress(wan_app: Any) -> None:
    *progress, last = stream(wan_app.handle, prompt="waves", seed=3, num_frames=5)
    assert isinstance(last.payload, Picture)
    assert [event.payload.step for event in progress][-1] == 4


def test_a_video_models_handle_gives_one_mp4(wan_app: Any) -> None:
    [video] = wan_app.handle.generate.remote(prompt="waves", seed=3, num_frames=5).result()
    answer = wan_app.client.post("/v1/videos/sync", json={"prompt": "waves", "seed": 3, "num_frames": 5})
    assert video.media.media_type == "video/mp4"
    assert video.media.data == answer.content


def test_a_wrong_field_raises_bad_request_with_its_name(handle: Any) -> None:
    with pytest.raises(BadRequest) as refused:
        handle.generate.remote(prompt="a fox", size="65x64").result()
    assert refused.value.param == "size"
    assert "multiples of 16" in refused.value.message


def test_a_stream_raises_bad_request_too(handle: Any) -> None:
    with pytest.raises(BadRequest) as refused:
        list(stream(handle, prompt=" "))
    assert refused.value.param == "prompt"


def test_a_wrong_model_raises_unknown_model(handle: Any) -> None:
    with pytest.raises(UnknownModel, match="'other' is not served here; served: 'tiny-flux'"):
        handle.generate.remote(prompt="a fox", model="other").result()


def test_a_cancelled_call_frees_its_seat_in_the_transformer(flux_app: Any, patient_app: Any) -> None:
    response = patient_app.handle.generate.remote(prompt="a fox", num_inference_steps=ENDLESS)
    flux_app.wait_for_seats(1)
    response.cancel()
    flux_app.wait_for_seats(0)

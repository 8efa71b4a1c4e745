"""Tests that bodies with a video become requests that redraw it, or an error that names the field."""

from dataclasses import replace
from typing import Any

import pytest

from deployments.families.calls import find_calls
from deployments.families.wan import WAN
from deployments.request import GenerationRequest
from serve_app.config.check import check_defaults, plan_warm_up
from serve_app.config.limits import LimitsConfig
from serve_app.errors import BadRequest
from serve_app.models.card import model_card
from serve_app.validation import Validator
from tests.pictures import video
from tests.serve_app.pictures import file, noise
from tests.serve_app.test_edit_validation import build_model

FILM = video(24, (96, 64), fps=12)
PICTURE = file(noise())
LIMITS = LimitsConfig(max_num_frames=33)


def served(pipeline_class: str = "WanPipeline") -> Validator:
    """Returns the validator of a checkpoint of this class. All but the class is Wan's."""
    return Validator(build_model(replace(WAN, pipeline_class=pipeline_class)), LIMITS)


def one(validator: Validator | None = None, **fields: Any) -> GenerationRequest:
    [request] = (validator or served()).requests({"prompt": "a cat", "input_reference": FILM} | fields)
    return request


def test_the_kind_and_its_defaults_go_by_what_goes_in() -> None:
    request, defaults = one(), WAN.calls["video_to_video"].defaults
    assert (request.kind, request.strength) == ("video_to_video", defaults.strength)
    [text_alone] = Validator(build_model(WAN), LimitsConfig()).requests({"prompt": "a cat"})
    assert (text_alone.kind, text_alone.strength, text_alone.num_frames) == ("generate", None, 81)


def test_a_video_goes_in_as_it_was_sent() -> None:
    pictures = served().validate_fields({"prompt": "a cat", "input_reference": FILM}).pictures
    assert pictures is not None
    assert (pictures.video, pictures.images, pictures.field) == (FILM, (), "input_reference")


def test_what_is_not_said_is_as_in_the_video() -> None:
    request = one()
    assert (request.width, request.height, request.num_frames, request.fps) == (96, 64, 21, 12)


@pytest.mark.parametrize(
    ("fields", "num_frames", "fps"),
    [({"num_frames": 9}, 9, 12), ({"seconds": 1}, 9, 12), ({"seconds": 2}, 21, 12), ({"fps": 24}, 21, 24)],
)
def test_a_request_may_say_how_much_of_it_and_how_fast(fields: dict[str, Any], num_frames: int, fps: int) -> None:
    request = one(**fields)
    assert (request.num_frames, request.fps) == (num_frames, fps)


@pytest.mark.parametrize(
    ("pipeline_class", "fields", "param", "told"),
    [
        ("WanPipeline", {"num_frames": 22}, "num_frames", "nearest: 21 or 25"),
        ("WanPipeline", {"num_frames": 25}, "num_frames", "asks for 25 frames; the video has 24"),
        ("WanPipeline", {"seconds": 2.5}, "seconds", "asks for 29 frames; the video has 24"),
        ("WanPipeline", {"num_frames": 37}, "num_frames", "the limit is 33"),
        ("WanPipeline", {"strength": 0.01}, "strength", "is less than one"),
        ("WanPipeline", {"strength": 0}, "strength", "greater than 0"),
        ("WanPipeline", {"strength": 0.5, "input_reference": None, "num_frames": 9}, "strength", "without a"),
        ("LucyEditPipeline", {"strength": 0.5}, "strength", "has no effect on this model"),
        ("WanPipeline", {"size": "100x64"}, "size", "multiples of 16"),
        ("WanPipeline", {"input_reference": video(40)}, "input_reference", "has over 33 frames, the limit: send"),
        (
            "WanPipeline",
            {"input_reference": PICTURE},
            "input_reference",
            "it is not a video: this model takes a",
        ),
        ("WanImageToVideoPipeline", {}, "input_reference", "it is a video: this model takes the image"),
        ("LucyEditPipeline", {"input_reference": None}, "input_reference", "is missing: this model needs a video"),
        ("MochiPipeline", {}, "input_reference", "makes videos from text alone"),
        ("WanPipeline", {"video": FILM}, "video", "did you mean input_reference?"),
    ],
)
def test_what_a_model_or_its_video_does_not_allow_is_refused_by_its_field(
    pipeline_class: str, fields: dict[str, Any], param: str, told: str
) -> None:
    with pytest.raises(BadRequest) as refused:
        one(served(pipeline_class), **fields)
    assert (refused.value.param, told in refused.value.message) == (param, True), refused.value.message


def test_of_a_long_video_the_first_frames_may_be_asked_for() -> None:
    assert one(input_reference=video(40), num_frames=33).num_frames == 33


def test_the_card_tells_that_a_video_goes_in() -> None:
    card = model_card(build_model(WAN), 0, LIMITS)
    assert {kind: (call.path, call.takes_video) for kind, call in card.calls.items()} == {
        "generate": ("/v1/videos/sync", False),
        "video_to_video": ("/v1/videos/sync", True),
    }


def test_a_model_that_needs_a_video_is_judged_and_warmed_up_with_a_blank_one() -> None:
    model = build_model(replace(WAN, pipeline_class="LucyEditPipeline"))
    check_defaults(model, LimitsConfig())
    warm = model.model_copy(update={"warm_up": ("64x64x9",)})
    [request] = plan_warm_up(warm, LimitsConfig())
    assert (request.kind, request.num_frames) == ("video_to_video", 9)


@pytest.mark.parametrize(
    ("pipeline_class", "kinds"),
    [
        ("CogVideoXPipeline", ["generate", "video_to_video"]),
        ("CogVideoXVideoToVideoPipeline", ["video_to_video"]),
        ("WanVideoToVideoPipeline", ["video_to_video"]),
        ("LucyEditPipeline", ["video_to_video"]),
        ("WanImageToVideoPipeline", ["image_to_video"]),
        ("WanVACEPipeline", ["generate"]),
    ],
)
def test_whether_a_video_goes_in_is_read_from_diffusers(pipeline_class: str, kinds: list[str]) -> None:
    calls = find_calls(pipeline_class)
    assert list(calls) == kinds
    assert all(call.media == "video" for call in calls.values())


def test_a_second_expert_may_have_a_scale_of_its_own() -> None:
    assert one(guidance_scale_2=3, input_reference=None, num_frames=9).guidance_scale_2 == 3
    assert one(input_reference=None, num_frames=9).guidance_scale_2 is None
    by_default = Validator(build_model(WAN, guidance_scale_2=2.5), LIMITS)
    assert one(by_default, input_reference=None, num_frames=9).guidance_scale_2 == 2.5
    with pytest.raises(BadRequest, match="guidance_scale_2: this model has no second expert") as refused:
        one(guidance_scale_2=3)
    assert refused.value.param == "guidance_scale_2"

"""Tests that a body is valid by the OpenAPI description if and only if the API accepts it."""

import base64
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from deployments.checkpoints.geometry import with_geometry
from deployments.config.model import DefaultsConfig, ModelConfig
from deployments.families import FAMILIES
from serve_app.config.limits import LimitsConfig
from serve_app.errors import BadRequest
from serve_app.http.fields import parse_body
from serve_app.http.openai_requests import EditBody, ImageBody, VideoBody
from serve_app.inputs.pictures import blank_png
from serve_app.inputs.videos import blank_video
from serve_app.models.served_models import Models
from serve_app.relay import Relay
from serve_app.routes import build_api

LIMITS = LimitsConfig(
    max_pixels=512 * 512, max_num_inference_steps=20, max_prompt_characters=50, max_num_frames=33
)
DEFAULTS = DefaultsConfig(width=64, height=64, num_inference_steps=2, num_frames=5)


def build(family: str, name: str = "m") -> Relay:
    offered = {"defaults": DEFAULTS, "schedulers": ["DDIMScheduler"], "prompt_weighting": family == "sdxl"}
    model = ModelConfig(name=name, checkpoint=f"tiny://{family}", family=family, **offered)
    return Relay(with_geometry(model), LIMITS, None, None, None)


def description(*relays: Relay) -> dict[str, Any]:
    return build_api(Models(relays)).openapi()


def described(api: dict[str, Any], path: str, content_type: str = "application/json") -> Any:
    """Returns a validator of bodies that knows only the description."""
    schema = api["paths"][path]["post"]["requestBody"]["content"][content_type]["schema"]
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def is_taken(relay: Relay, kind: type[ImageBody] | type[VideoBody], body: dict[str, Any]) -> bool:
    try:
        relay.validator.validate(parse_body(kind, body, is_json=True))
    except BadRequest:
        return False
    return True


ANY: list[dict[str, Any]] = [
    {},
    {"prompt": "x" * 50},
    {"prompt": "x" * 51},
    {"prompt": ""},
    {"prompt": " \t\n"},
    {"prompt": None},
    {"prompt": 1},
    {"negative_prompt": "x" * 51},
    {"negative_prompt": ""},
    {"size": "auto"},
    {"size": "64x64"},
    {"size": "512x512"},
    {"size": "64x65"},
    {"size": "0x0"},
    {"size": "064x064"},
    {"size": "512x528"},
    {"size": "64X64"},
    {"size": ""},
    {"size": 64},
    {"num_inference_steps": 20},
    {"num_inference_steps": 20.0},
    {"num_inference_steps": 21},
    {"num_inference_steps": "2"},
    {"num_inference_steps": True},
    {"guidance_scale": 100},
    {"guidance_scale": 100.5},
    {"guidance_scale": "3"},
    {"true_cfg_scale": 2},
    {"seed": 2**63 - 1},
    {"seed": 2**63},
    {"seed": 1.5},
    {"scheduler": "DDIMScheduler"},
    {"scheduler": "DDPMScheduler"},
    {"scheduler": None},
    {"prompt_weighting": True},
    {"prompt_weighting": False},
    {"user": "somebody"},
    {"user": 1},
    {"user": "x" * 512},
    {"user": "x" * 513},
    {"priority": "low"},
    {"priority": None},
    {"priority": "urgent"},
    {"priority": 1},
    {"deadline_s": 30},
    {"deadline_s": 0.5},
    {"deadline_s": None},
    {"deadline_s": 0},
    {"deadline_s": "30"},
    {"deadline_s": 8 * 86_400},
    {"colour": "red"},
    {"colour": None},
]
IMAGES: list[dict[str, Any]] = [
    {"n": 10, "stream": True, "partial_images": 3, "progress": True},
    {"n": 11},
    {"n": None, "stream": None, "partial_images": None, "progress": None, "size": None, "output_format": None},
    {"n": "1"},
    {"stream": "true"},
    {"stream": 1},
    {"partial_images": 1},
    {"partial_images": 0, "progress": False},
    {"progress": True},
    {"progress": True, "stream": False},
    {"output_compression": 50},
    {"output_compression": 100},
    {"output_compression": 50, "output_format": "png"},
    {"output_compression": 50, "output_format": "jpeg"},
    {"output_format": "gif"},
    {"response_format": "url"},
    {"response_format": "b64_json"},
    {"background": "transparent"},
    {"background": "true"},
    {"background": True},
    {"background": False, "stream": True},
    {"background": True, "stream": True},
    {"background": 1},
    {"quality": "hd", "style": "vivid", "moderation": "low", "background": "opaque"},
    {"num_frames": 5},
]
PICTURE = f"data:image/png;base64,{base64.b64encode(blank_png()).decode()}"
EDITS: list[dict[str, Any]] = [
    {"image": [PICTURE]},
    {"image": []},
    {"image": [PICTURE, PICTURE]},
    {"image": None},
    {"image": "https://example.com/cat.png"},
    {"image": 5},
    {"mask": PICTURE},
    {"mask": None},
    {"mask": "cat.png"},
    {"mask": [PICTURE]},
    {"strength": 1},
    {"strength": 0.1},
    {"strength": 0},
    {"strength": 1.1},
    {"strength": None},
    {"input_fidelity": "high"},
    {"input_fidelity": "middling"},
]
VIDEO = f"data:video/mp4;base64,{base64.b64encode(blank_video(5)).decode()}"
VIDEOS: list[dict[str, Any]] = [
    {"num_frames": 33},
    {"num_frames": 34},
    {"num_frames": 37},
    {"num_frames": 0},
    {"num_frames": 5, "seconds": 3600},
    {"seconds": 1},
    {"seconds": 3000},
    {"seconds": 0},
    {"seconds": "1"},
    {"seconds": 0.2, "fps": 120},
    {"fps": 120},
    {"fps": 121},
    {"strength": 0.5},
    {"strength": None, "input_reference": None},
    {"input_reference": "waves.mp4"},
    {"input_reference": VIDEO},
    {"input_reference": VIDEO, "strength": 0.5, "num_inference_steps": 10},
    {"input_reference": VIDEO, "strength": 1.5, "num_inference_steps": 10},
    {"n": 1},
    {"stream": True},
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_body_is_described_where_it_is_taken_and_only_there(family: str) -> None:
    relay, is_video = build(family), FAMILIES[family].media == "video"
    paths, kind = ["/v1/images/generations"], ImageBody
    if is_video:
        paths, kind = ["/v1/videos/sync", "/v1/videos"], VideoBody
    bodies = [*ANY, *(VIDEOS if is_video else IMAGES)]
    for judge in (described(description(relay), path) for path in paths):
        for body in ({"prompt": "a cat"} | body for body in bodies):
            assert judge.is_valid(body) == is_taken(relay, kind, body), body


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if "edit" in family.calls])
def test_an_edit_is_described_where_it_is_taken_and_only_there(family: str) -> None:
    relay = build(family)
    judge = described(description(relay), "/v1/images/edits")
    steps = {"num_inference_steps": 10}  # with fewer, a small strength leaves no step
    for body in ({"prompt": "a cat", "image": PICTURE} | steps | body for body in [*ANY, *IMAGES, *EDITS]):
        if "num_inference_steps" in body and body["num_inference_steps"] in (2, 2.0):
            continue
        assert judge.is_valid(body) == is_taken(relay, EditBody, body), body
    assert not judge.is_valid({"prompt": "a cat"})


def test_a_form_is_described_with_files() -> None:
    form = described(description(build("flux")), "/v1/images/edits", "multipart/form-data")
    assert form.is_valid({"prompt": "a cat", "image": "bytes of any kind", "mask": "bytes"})
    assert not form.is_valid({"prompt": "a cat", "image": ["bytes", "bytes"]})
    assert form.schema["properties"]["image"]["anyOf"][0]["contentMediaType"] == "application/octet-stream"


def test_a_form_is_described_without_nulls() -> None:
    form = described(description(build("wan")), "/v1/videos/sync", "multipart/form-data")
    assert form.is_valid({"prompt": "waves", "num_frames": 5})
    for field in form.schema["properties"]:
        assert not form.is_valid({"prompt": "waves", field: None})


def test_a_list_or_text_is_no_body() -> None:
    judge = described(description(build("flux")), "/v1/images/generations")
    assert not judge.is_valid(["a cat"])
    assert not judge.is_valid("a cat")


@pytest.mark.parametrize(
    ("family", "paths"),
    [
        ("flux", ["/v1/images/generations", "/v1/images/edits"]),
        ("wan", ["/v1/videos/sync", "/v1/videos", "/v1/videos/{job_id}/remix"]),
    ],
)
def test_only_what_this_model_makes_is_described(family: str, paths: list[str]) -> None:
    api = description(build(family))
    assert [path for path in api["paths"] if "post" in api["paths"][path]] == paths
    for operations in api["paths"].values():
        for operation in operations.values():
            assert "422" not in operation["responses"]


def test_an_error_that_ends_a_stream_is_described_as_one_of_its_events() -> None:
    api = description(build("flux"))
    for name in ("ImageStreamEvent", "ImageEditStreamEvent"):
        events = api["components"]["schemas"][name] | {"components": api["components"]}
        error = BadRequest("too large", "size").body()
        assert Draft202012Validator(events).is_valid(error)
        assert not Draft202012Validator(events).is_valid({"type": "image_generation.unheard_of"})

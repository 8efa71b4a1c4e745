"""Tests that bodies with images become requests of the right kind, or an error that names the field."""

from dataclasses import replace
from typing import Any, get_type_hints

import pytest
from openai.types.image_edit_params import ImageEditParamsBase
from PIL import Image

from deployments.config.model import DefaultsConfig, ModelConfig
from deployments.families import FAMILIES, Family
from deployments.families.calls import find_calls
from deployments.families.flux import FLUX
from deployments.families.wan import WAN
from deployments.request import GenerationRequest
from serve_app.config.app import ConfigError
from serve_app.config.check import check_defaults, plan_warm_up
from serve_app.config.limits import LimitsConfig
from serve_app.errors import BadRequest
from serve_app.http.fields import parse_body
from serve_app.http.openai_requests import EditBody, ImageBody
from serve_app.models.card import model_card
from serve_app.validation import Validator
from tests.serve_app.pictures import data_url, file, noise
from tests.serve_app.test_validation import choices

PICTURE, OTHER = file(noise()), file(noise(1))


def build_model(family: Family, **defaults: Any) -> ModelConfig:
    model = ModelConfig(name="m", checkpoint="somewhere", defaults=DefaultsConfig(**defaults))
    return model.with_derived_family(family, family.geometry(family.published))


def served(pipeline_class: str, **limits: Any) -> Validator:
    """Returns the validator of a checkpoint of this class. All but the class is FLUX's, or Wan's for videos."""
    entry = WAN if next(iter(find_calls(pipeline_class).values())).media == "video" else FLUX
    return Validator(build_model(replace(entry, pipeline_class=pipeline_class)), LimitsConfig(**limits))


def one(validator: Validator, **fields: Any) -> GenerationRequest:
    [request] = validator.requests({"prompt": "a cat"} | fields)
    return request


def blank(width: int, height: int) -> bytes:
    return file(Image.new("L", (width, height)))


def rejection(validator: Validator, **fields: Any) -> BadRequest:
    with pytest.raises(BadRequest) as refused:
        one(validator, **fields)
    return refused.value


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if "edit" in family.calls])
def test_the_kind_goes_by_the_pictures_and_the_defaults_by_the_kind(family: str) -> None:
    validator, calls = Validator(build_model(FAMILIES[family]), LimitsConfig()), FAMILIES[family].calls
    for pictures in ({}, {"image": PICTURE}, {"image": [PICTURE], "mask": OTHER}):
        request = one(validator, **pictures)
        assert request.kind == ("inpaint" if "mask" in pictures else "edit" if pictures else "generate")
        for name in ("num_inference_steps", "guidance_scale", "true_cfg_scale", "strength"):
            assert getattr(request, name) == getattr(calls[request.kind].defaults, name), name


def test_pictures_go_in_as_they_were_sent() -> None:
    validated = served("Flux2Pipeline").validate_fields({"prompt": ["a cat", "a dog"], "image": [PICTURE, OTHER]})
    assert validated.pictures is not None
    assert (validated.pictures.images, validated.pictures.mask) == ((PICTURE, OTHER), None)
    assert [request.prompt.text for request in validated.requests] == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("pipeline_class", "fields", "param", "told"),
    [
        ("FluxFillPipeline", {}, "image", "image is missing: send the image to begin with"),
        (
            "FluxFillPipeline",
            {"image": PICTURE},
            "mask",
            "mask is missing: this model redraws only the masked part",
        ),
        ("QwenImageEditPlusPipeline", {"image": PICTURE, "mask": OTHER}, "mask", "mask: this model takes no mask"),
        ("QwenImageEditPlusPipeline", {"image": [PICTURE] * 11}, "image", "takes at most 10, got 11"),
        ("FluxPipeline", {"image": [PICTURE, OTHER]}, "image", "takes at most 1, got 2"),
        (
            "Flux2KleinPipeline",
            {"image": [PICTURE] * 2, "mask": OTHER},
            "image",
            "takes at most 1 beside a mask, got 2",
        ),
        ("ChromaPipeline", {"image": PICTURE, "strength": 0}, "strength", "greater than 0"),
        ("FluxKontextPipeline", {"image": PICTURE, "strength": 0.5}, "strength", "has no effect on this model"),
        ("FluxPipeline", {"image": PICTURE, "guidance_scale": 101}, "guidance_scale", "less than or equal to 100"),
        ("SanaPipeline", {"image": PICTURE}, "model", "from text alone: use /v1/images/generations"),
        ("MochiPipeline", {"input_reference": PICTURE}, "input_reference", "makes videos from text alone"),
        ("WanPipeline", {"image": PICTURE}, "image", "did you mean input_reference?"),
        ("WanImageToVideoPipeline", {}, "input_reference", "input_reference is missing"),
        ("WanImageToVideoPipeline", {"input_reference": b"GIF89a"}, "input_reference", "it is a GIF"),
        ("FluxPipeline", {"control_image": PICTURE}, "control_image", "has no ControlNet"),
        ("FluxPipeline", {"image": PICTURE, "control_scale": 1}, "control_scale", "has no ControlNet"),
        ("FluxControlNetPipeline", {}, "control_image", "this model needs one; send it to /v1/images/edits"),
        ("FluxControlNetPipeline", {"image": PICTURE}, "control_image", "control_image is missing"),
        ("FluxControlNetPipeline", {"control_image": b"GIF89a"}, "control_image", "it is a GIF"),
        ("FluxControlNetPipeline", {"mask": PICTURE, "control_image": PICTURE}, "image", "image is missing"),
        ("FluxPipeline", {"strength": 0.5}, "strength", "send images to /v1/images/edits"),
        ("FluxPipeline", {"init_image": PICTURE}, "init_image", "send images to /v1/images/edits"),
        ("FluxPipeline", {"image": PICTURE, "denoising_strength": 0.5}, "denoising_strength", "mean strength?"),
        ("FluxPipeline", {"image": PICTURE, "mask_image": OTHER}, "mask_image", "did you mean mask?"),
    ],
)
def test_what_a_model_does_not_take_is_refused_by_its_field(
    pipeline_class: str, fields: dict[str, Any], param: str, told: str
) -> None:
    error = rejection(served(pipeline_class), **fields)
    assert (error.param, told in error.message) == (param, True), error.message


def test_a_model_that_makes_nothing_from_text_says_where_it_is_asked() -> None:
    with pytest.raises(BadRequest, match="makes images from images: use /v1/images/edits") as refused:
        served("FluxFillPipeline").validate(parse_body(ImageBody, {"prompt": "a cat"}))
    assert refused.value.param == "model"


@pytest.mark.parametrize(
    ("pictures", "kind"),
    [({}, "generate"), ({"image": PICTURE}, "edit"), ({"image": PICTURE, "mask": OTHER}, "inpaint")],
)
def test_a_control_picture_goes_with_every_kind_of_call(pictures: dict[str, Any], kind: str) -> None:
    validator = served("FluxControlNetPipeline")
    validated = validator.validate_fields(
        {"prompt": "a cat", "control_image": blank(96, 64), "control_scale": 0.5} | pictures
    )
    [request] = validated.requests
    assert validated.pictures is not None
    assert (request.kind, request.control_scale, validated.pictures.control) == (kind, 0.5, blank(96, 64))
    assert (request.width, request.height) == ((64, 64) if pictures else (96, 64))


def test_a_model_that_begins_with_a_picture_takes_one() -> None:
    request = one(served("WanImageToVideoPipeline"), input_reference=PICTURE, size="64x64", num_frames=5)
    assert (request.kind, request.num_frames) == ("image_to_video", 5)


@pytest.mark.parametrize(("steps", "strength"), [(1, 0.6), (4, 0.2), (9, 0.1)])
def test_a_strength_that_leaves_no_step_is_refused_and_what_is_said_instead_is_taken(
    steps: int, strength: float
) -> None:
    validator, fields = served("FluxPipeline"), {"image": PICTURE, "strength": strength}
    error = rejection(validator, num_inference_steps=steps, **fields)
    assert error.param == "strength"
    enough = int(error.message.partition("num_inference_steps of ")[2].partition(" ")[0])
    assert enough > steps
    assert one(validator, num_inference_steps=enough, **fields)


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        ((64, 64), (64, 64)),
        ((100, 60), (96, 64)),
        ((640, 480), (640, 480)),
        ((1024, 1024), (1024, 1024)),
        ((4000, 3000), (1184, 880)),
        ((3000, 4000), (880, 1184)),
        ((17, 16), (16, 16)),
        ((6000, 16), (6000, 16)),
    ],
)
def test_auto_has_the_shape_of_the_first_picture_and_no_more_pixels_than_the_model_draws(
    picture: tuple[int, int], expected: tuple[int, int]
) -> None:
    request = one(served("Flux2Pipeline"), image=[blank(*picture), PICTURE])
    assert (request.width, request.height) == expected


def test_auto_stays_within_the_limits_and_an_explicit_size_goes_before_it() -> None:
    validator = served("FluxPipeline", max_pixels=1024 * 1024)
    large = blank(1500, 1490)
    request = one(validator, image=large)
    assert request.width * request.height <= 1024 * 1024
    assert one(validator, image=large, size="64x32").size == replace(request, width=64, height=32).size
    sd3 = Validator(build_model(FAMILIES["sd3"]), LimitsConfig())
    assert one(sd3, image=blank(16, 4000)).height <= 3072


@pytest.mark.parametrize(
    ("image", "told"),
    [
        ("https://example.com/cat.png", "never fetched"),
        ("HTTP://example.com/cat.png", "never fetched"),
        ("file:///etc/passwd", "neither a file (in curl: -F image=@FILE) nor a data URL"),
        ("/etc/passwd", "nor a data URL"),
        ("data:image/png;base64,%%%", "not base64"),
        ("data:image/png,abc", "nor a data URL"),
        ({"file_id": "file-1"}, "send a file, or a data URL"),
        (5, "send a file, or a data URL"),
        ([], "the list is empty"),
        ([PICTURE, "x" * 10**6], "nor a data URL"),
        ("data:;base64,", "it is empty"),
        (data_url(b"GIF89a"), "it is a GIF"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_picture_is_refused_without_being_repeated(image: Any, told: str) -> None:
    error = rejection(served("FluxPipeline"), image=image)
    assert error.param == "image"
    assert told in error.message
    assert len(error.message) < 200


def test_what_openais_types_let_an_app_say_of_an_edit_is_taken() -> None:
    """Exceptions: GIF, SVG, transparency, URLs, and marks on an image."""
    fields, validator = get_type_hints(ImageEditParamsBase), served("FluxPipeline")
    elsewhere = {"complexity", "frame_count", "frame_duration_ms", "svg", "markup"}
    assert fields.keys() - EditBody.model_fields.keys() == elsewhere
    plain = one(validator, image=PICTURE, seed=1)
    for name in ("quality", "input_fidelity"):
        for value in choices(fields[name]):
            asked = one(validator, image=PICTURE, seed=1, **{name: value})
            assert replace(asked, quality="high", step_cache=None) == plain


def test_the_card_tells_each_kind_where_it_is_asked_and_with_what() -> None:
    card = model_card(build_model(FLUX, strength=0.5), 0, LimitsConfig())
    assert {kind: (call.path, call.max_images) for kind, call in card.calls.items()} == {
        "generate": ("/v1/images/generations", 0),
        "edit": ("/v1/images/edits", 1),
        "inpaint": ("/v1/images/edits", 1),
    }
    assert [call.defaults.strength for call in card.calls.values()] == [None, 0.5, 0.5]
    assert card.calls["edit"].defaults.guidance_scale == FLUX.calls["edit"].defaults.guidance_scale
    assert (card.limits.max_image_bytes, card.limits.max_image_pixels) == (20 * 2**20, 25_000_000)


@pytest.mark.parametrize(
    ("pipeline_class", "kind"),
    [("FluxPipeline", "generate"), ("FluxFillPipeline", "inpaint"), ("QwenImageEditPipeline", "edit")],
)
def test_defaults_are_judged_and_warmed_up_in_the_kind_that_the_checkpoint_was_saved_for(
    pipeline_class: str, kind: str
) -> None:
    model = build_model(replace(FLUX, pipeline_class=pipeline_class))
    check_defaults(model, LimitsConfig())
    warm = model.model_copy(update={"warm_up": ("64x64",)})
    assert [request.kind for request in plan_warm_up(warm, LimitsConfig())] == [kind]


def test_a_strength_by_default_that_no_kind_takes_is_refused_at_start() -> None:
    check_defaults(build_model(FLUX, strength=0.5), LimitsConfig())
    with pytest.raises(ConfigError, match="strength has no effect on flux"):
        check_defaults(build_model(replace(FLUX, pipeline_class="Flux2Pipeline"), strength=0.5), LimitsConfig())

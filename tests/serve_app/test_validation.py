"""Tests that bodies become requests, or an error that names the field. Over HTTP: test_errors.py."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
from openai.types.image_generate_params import ImageGenerateParamsBase

from deployments.checkpoints.geometry import with_geometry
from deployments.checkpoints.source import with_family
from deployments.config.model import DefaultsConfig, ModelConfig
from deployments.families import FAMILIES, Geometry
from deployments.options.qos import DEFAULT_QOS, Qos
from deployments.request import GenerationRequest, Prompt
from serve_app.app import build_app
from serve_app.config.app import AppConfig, ConfigError
from serve_app.config.limits import LimitsConfig
from serve_app.errors import BadRequest, UnknownModel
from serve_app.http.openai_requests import ImageBody
from serve_app.models.card import model_card
from serve_app.validation import Validator

NEVER_GUIDED_ALONE = {"flux", "qwen-image"}
"""Families whose guidance needs a negative prompt."""


def build_validator(family: str, *, limits: dict[str, Any] | None = None, **defaults: Any) -> Validator:
    own = DefaultsConfig(**defaults)
    model = ModelConfig(name="m", checkpoint=f"tiny://{family}", family=family, defaults=own)
    return Validator(model.with_geometry(published(family)), LimitsConfig(**limits or {}))


def published(family: str) -> Geometry:
    """Returns the geometry of the family's published model."""
    return FAMILIES[family].geometry(FAMILIES[family].published)


def one(family: str, **fields: Any) -> GenerationRequest:
    [request] = build_validator(family).requests({"prompt": "a cat"} | fields)
    return request


def rejection(family: str, **fields: Any) -> BadRequest:
    with pytest.raises(BadRequest) as refused:
        one(family, **fields)
    return refused.value


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_request_leaves_out_is_the_familys_default_or_the_checkpoints(family: str) -> None:
    request, defaults, geometry = one(family), FAMILIES[family].call.defaults, published(family)
    for name in ("num_inference_steps", "guidance_scale", "true_cfg_scale"):
        assert getattr(request, name) == getattr(defaults, name), name
    for name in ("width", "height", "num_frames"):
        assert getattr(request, name) == getattr(geometry, name), name


def test_the_configs_default_goes_before_the_familys_and_the_request_before_both() -> None:
    validator = build_validator("flux", width=128, num_inference_steps=4)
    [request] = validator.requests({"prompt": "a cat"})
    assert (request.width, request.height, request.num_inference_steps) == (128, 1024, 4)
    [request] = validator.requests({"prompt": "a cat", "size": "64x32", "num_inference_steps": 9})
    assert (request.width, request.height, request.num_inference_steps) == (64, 32, 9)


def test_picture_i_has_seed_plus_i_and_differs_in_nothing_else() -> None:
    requests = build_validator("sd15").requests({"prompt": "a cat", "n": 3, "seed": 7})
    assert [request.seed for request in requests] == [7, 8, 9]
    assert len({(r.prompt, r.width, r.height, r.num_inference_steps, r.guidance_scale) for r in requests}) == 1


def test_of_several_prompts_each_makes_what_it_makes_alone() -> None:
    validator = build_validator("sd15")
    alone = [validator.requests({"prompt": prompt, "n": 2, "seed": 7}) for prompt in ("a cat", "a dog")]
    assert validator.requests({"prompt": ["a cat", "a dog"], "n": 2, "seed": 7}) == [*alone[0], *alone[1]]


@pytest.mark.parametrize("prompts", [[], ["a cat"] * 3, ["a cat", ""], [["a cat"]], ["a cat", 1]], ids=str)
def test_a_list_of_prompts_is_judged_as_a_whole_and_each_for_itself(prompts: list[Any]) -> None:
    validator = build_validator("sd15", limits={"max_concurrent_requests": 5})
    with pytest.raises(BadRequest) as refused:
        validator.requests({"prompt": prompts, "n": 2})
    assert refused.value.param == "prompt"


def test_seeds_stay_what_a_generator_takes() -> None:
    requests = build_validator("sd15").requests({"prompt": "a cat", "n": 2, "seed": 2**63 - 1})
    assert [request.seed for request in requests] == [2**63 - 1, 0]


def test_a_seed_left_out_is_drawn_anew() -> None:
    assert len({one("sd15").seed for _ in range(8)}) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_negative_prompt_guides_when_its_scale_is_above_one(family: str) -> None:
    scale = {FAMILIES[family].call.guidance: 3.0}
    assert one(family, negative_prompt="dark", **scale).prompt == Prompt("a cat", "dark", is_guided=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_guidance_the_negative_prompt_is_not_encoded(family: str) -> None:
    scale = {FAMILIES[family].call.guidance: 1.0}
    assert one(family, negative_prompt="dark", **scale).prompt == Prompt("a cat", None, is_guided=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_guidance_without_a_negative_prompt_is_each_familys_own(family: str) -> None:
    is_guided = one(family, **{FAMILIES[family].call.guidance: 3.0}).prompt.is_guided
    assert is_guided == (family not in NEVER_GUIDED_ALONE)


@pytest.mark.parametrize(
    ("family", "field"), [("sd15", "true_cfg_scale"), ("wan", "true_cfg_scale"), ("qwen-image", "guidance_scale")]
)
def test_a_scale_that_means_nothing_to_a_family_is_refused(family: str, field: str) -> None:
    error = rejection(family, **{field: 2.0})
    assert error.param == field
    assert error.message == f"{field} has no effect on {family}; use {FAMILIES[family].call.guidance}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_size_error_names_the_nearest_size_and_that_one_is_taken(family: str) -> None:
    multiple = published(family).size_multiple
    error = rejection(family, size=f"{5 * multiple + 1}x{4 * multiple - 1}")
    assert error.param == "size"
    assert f"nearest: {5 * multiple}x{4 * multiple}" in error.message
    request = one(family, size=error.message.rpartition(" ")[2])
    assert (request.width, request.height) == (5 * multiple, 4 * multiple)


@pytest.mark.parametrize(("output_format", "most"), [("jpeg", 65_500), ("webp", 16_383), ("png", 99_984)], ids=str)
def test_a_side_that_a_format_cannot_hold_is_refused_at_once(output_format: str, most: int) -> None:
    """The limits are those of the file formats; 99,984 is the longest valid side of five digits."""
    validator = build_validator("flux")
    longest = most // 16 * 16
    for size in (f"{longest}x16", f"16x{longest}"):
        assert validator.requests({"prompt": "a cat", "size": size, "output_format": output_format})
    if output_format == "png":
        return
    for size in (f"{longest + 16}x16", f"16x{longest + 16}"):
        error = rejection("flux", size=size, output_format=output_format)
        assert error.param == "size"
        assert f"output_format {output_format}, which allows at most {most} pixels a side" in error.message


def test_a_side_that_h264_cannot_hold_is_refused_at_once() -> None:
    error = rejection("wan", size="16400x16", num_frames=1)
    assert (error.param, "16384 pixels" in error.message) == ("size", True)


def test_a_side_that_the_denoiser_has_no_positions_for_is_refused() -> None:
    assert one("sd3", size="3072x16").width == 3072
    assert "draws at most 3072 pixels each way, got 3088x16" in rejection("sd3", size="3088x16").message


def test_frames_go_by_the_checkpoints_vae() -> None:
    model = ModelConfig(name="m", checkpoint="tiny://wan", family="wan")
    validator = Validator(model.with_geometry(replace(published("wan"), frame_multiple=2)), LimitsConfig())
    assert validator.requests({"prompt": "a cat", "num_frames": 7})[0].num_frames == 7
    with pytest.raises(BadRequest, match="1 more than a multiple of 2, got 8; nearest: 7 or 9"):
        validator.requests({"prompt": "a cat", "num_frames": 8})


def test_the_model_card_tells_the_checkpoints_sizes() -> None:
    model = read_model_of("tiny://sd3")
    card = model_card(model, 0, LimitsConfig())
    assert (card.defaults.size, card.limits.size_multiple, card.limits.max_side) == ("64x64", 16, 512)


def read_model_of(checkpoint: str) -> ModelConfig:
    return with_geometry(with_family(ModelConfig(name="m", checkpoint=checkpoint)))


def test_sides_that_fit_are_refused_when_their_product_does_not() -> None:
    validator = build_validator("flux", limits={"max_pixels": 64 * 64})
    assert validator.requests({"prompt": "a cat", "size": "128x32"})
    with pytest.raises(BadRequest, match="128x48 has 6144 pixels; the limit is 4096"):
        validator.requests({"prompt": "a cat", "size": "128x48"})


@pytest.mark.parametrize(
    ("seconds", "fps", "num_frames"), [(1, 16, 17), (0.5, 16, 9), (5, 16, 81), (2, 24, 49), (0.01, 16, 1)]
)
def test_seconds_become_frames_that_the_family_can_make(seconds: float, fps: int, num_frames: int) -> None:
    request = one("wan", seconds=seconds, fps=fps)
    assert (request.num_frames, request.fps) == (num_frames, fps)
    assert request.num_frames % published("wan").frame_stride == 1


def test_num_frames_goes_before_seconds() -> None:
    assert one("wan", num_frames=5, seconds=3).num_frames == 5


def test_too_many_seconds_are_told_as_seconds() -> None:
    error = rejection("wan", seconds=60)
    assert (error.param, error.message) == ("seconds", "seconds asks for 961 frames; the limit is 161")


def test_a_frame_count_error_names_the_nearest_two() -> None:
    assert "nearest: 5 or 9" in rejection("wan", num_frames=6).message


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_null_stands_for_a_field_left_out(family: str) -> None:
    """OpenAI's clients send null for fields whose types are optional."""
    nulls = dict.fromkeys(["model", "size", "user", "seed", "negative_prompt", "num_inference_steps"])
    assert one(family, **nulls, **({} if family == "wan" else {"n": None, "output_format": None})).width
    assert rejection(family, prompt=None).message == "prompt: Field required"


def test_what_openais_types_let_an_app_say_is_taken() -> None:
    """Exceptions: GIF, SVG, transparency and URLs."""
    fields = get_type_hints(ImageGenerateParamsBase)
    assert fields.keys() - ImageBody.model_fields.keys() == {
        "complexity",
        "frame_count",
        "frame_duration_ms",
        "svg",
    }
    plain = one("flux", seed=1)
    for name in ("quality", "style", "moderation"):
        for value in choices(fields[name]):
            asked = one("flux", seed=1, **{name: value})
            assert replace(asked, quality="high", step_cache=None) == plain
    assert one("flux", seed=1, user="me", safety_identifier="me") == plain


QOS: list[tuple[dict[str, Any], Qos]] = [
    ({}, DEFAULT_QOS),
    ({"priority": None, "deadline_s": None, "user": None}, DEFAULT_QOS),
    ({"priority": "high", "deadline_s": 20, "user": "ann"}, Qos("high", "ann", 20)),
    ({"safety_identifier": "a1b2"}, Qos(share="a1b2")),
    ({"user": "ann", "safety_identifier": "a1b2"}, Qos(share="ann")),
]


@pytest.mark.parametrize(("fields", "qos"), QOS)
@pytest.mark.parametrize("family", ["flux", "wan"])
def test_who_goes_first_is_judged_beside_the_request(family: str, fields: dict[str, Any], qos: Qos) -> None:
    validator = build_validator(family)
    asked = {"prompt": "a cat", "seed": 1} | fields
    assert validator.validate_fields(asked).qos == qos
    assert validator.validate_stream(asked).qos == qos
    assert validator.validate_fields(asked | {"prompt": ["a cat", "a dog"]}).qos == qos
    assert one(family, seed=1, **fields) == one(family, seed=1)


def test_a_keys_name_counts_more_than_what_its_client_says() -> None:
    assert Qos(share="ann").asked_by("team-a").share == "team-a"
    assert Qos(share="ann").asked_by(None).share == "ann"


def choices(hint: Any) -> Iterator[str]:
    """Yields the values that the Literals in a type allow."""
    for part in get_args(hint):
        yield from choices(part) if get_args(part) else [part] if isinstance(part, str) else []


def test_an_error_repeats_no_more_of_the_input_than_one_can_read() -> None:
    assert len(rejection("flux", seed=["1234567890"] * 10_000).message) < 500


def test_the_served_models_name_may_be_left_out_but_not_wrong() -> None:
    assert one("flux", model="m") is not None
    with pytest.raises(UnknownModel, match="model 'other' is not served here; served: 'm'"):
        one("flux", model="other")


@pytest.mark.parametrize(
    ("family", "defaults", "limits", "message"),
    [
        ("flux", {"width": 100}, {}, "size: width and height must be multiples of 16, got 100x1024"),
        ("flux", {}, {"max_pixels": 256 * 256}, "1024x1024 has 1048576 pixels; the limit is 65536"),
        ("flux", {"num_inference_steps": 200}, {}, "num_inference_steps must be between 1 and 150, got 200"),
        ("sd15", {"true_cfg_scale": 2.0}, {}, "true_cfg_scale has no effect on sd15"),
        ("sdxl", {"num_frames": 5}, {}, "num_frames: unknown field"),
        ("wan", {"num_frames": 6}, {}, "num_frames must be 1 more than a multiple of 4, got 6"),
        ("wan", {}, {"max_num_frames": 33}, "num_frames asks for 81 frames; the limit is 33"),
        ("flux", {"negative_prompt": "dog \ud83d"}, {}, "negative_prompt: character 4 is half a character"),
    ],
)
def test_a_default_that_a_request_could_not_ask_for_is_refused_before_anything_starts(
    family: str, defaults: dict[str, Any], limits: dict[str, Any], message: str
) -> None:
    own = DefaultsConfig(**defaults)
    model = ModelConfig(name="m", checkpoint=f"tiny://{family}", family=family, defaults=own)
    with pytest.raises(ConfigError, match=r"model\.defaults") as refused:
        build_app(AppConfig(model=model, limits=LimitsConfig(**limits)))
    assert message in str(refused.value)


def test_a_model_that_has_sizes_of_its_own_takes_these_and_names_them() -> None:
    model, sizes = ModelConfig(name="m", checkpoint="tiny://flux", family="flux"), ((1024, 1024), (1280, 768))
    validator = Validator(model.with_geometry(replace(published("flux"), sizes=sizes)), LimitsConfig())
    for size in ("auto", "1280x768"):
        [request] = validator.requests({"prompt": "a cat", "size": size})
        assert (request.width, request.height) in sizes
    with pytest.raises(BadRequest, match="size: this model draws 1024x1024, 1280x768; got 768x1280") as refused:
        validator.requests({"prompt": "a cat", "size": "768x1280"})
    assert refused.value.param == "size"

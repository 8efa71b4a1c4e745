"""Tests of the base of every config class, and of a stage's resources."""

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
from pydantic import Field, ValidationError

from cluster.config import Config, describe_errors, find_mistakes
from cluster.replicas.resources import ResourceConfig


class OvenConfig(Config):
    heat_c: int = Field(180, ge=50, le=250)
    name: str = Field("oven", min_length=1)


class KitchenConfig(Config):
    address: str
    oven: OvenConfig = OvenConfig()


def mistakes(kind: type[Config], values: Any) -> list[str]:
    with pytest.raises(ValidationError) as refused:
        kind.model_validate(values)
    return describe_errors(refused.value).splitlines()


def test_an_unknown_key_is_named_with_the_allowed_ones() -> None:
    assert mistakes(OvenConfig, {"colour": "red"}) == ["config: unknown key 'colour'; allowed: heat_c, name"]


def test_a_near_miss_gets_a_hint() -> None:
    [line] = mistakes(OvenConfig, {"heat": 200})
    assert line == "config: unknown key 'heat' (did you mean 'heat_c'?); allowed: heat_c, name"


class RenamedConfig(OvenConfig):
    renamed: ClassVar[Mapping[str, str]] = {"temperature": "heat_c"}


def test_a_key_that_was_renamed_still_works_and_warns() -> None:
    with pytest.warns(FutureWarning, match="'temperature' is now called 'heat_c'"):
        assert RenamedConfig.model_validate({"temperature": 200}) == RenamedConfig(heat_c=200)
    with pytest.warns(FutureWarning, match="'temperature' is now called 'heat_c'"):
        assert find_mistakes(RenamedConfig, {"temperature": 200}) == []


def test_a_key_that_stands_under_both_names_is_refused() -> None:
    [line] = mistakes(RenamedConfig, {"temperature": 200, "heat_c": 100})
    assert line == "config: unknown key 'temperature' (did you mean 'heat_c'?); allowed: heat_c, name"


def test_a_key_that_is_no_text_is_an_unknown_key() -> None:
    """YAML reads `on:` as a boolean and `8080:` as a number."""
    assert "unknown key True" in mistakes(OvenConfig, {True: 1})[0]


def test_a_wrong_value_is_told_with_its_place_and_its_limit() -> None:
    [line] = mistakes(KitchenConfig, {"address": "x", "oven": {"heat_c": 300}})
    assert line == "oven.heat_c: Input should be less than or equal to 250, got 300"


def test_every_mistake_gets_a_line() -> None:
    lines = mistakes(KitchenConfig, {"oven": {"heat_c": "hot", "name": ""}})
    assert [line.partition(":")[0] for line in lines] == ["address", "oven.heat_c", "oven.name"]


class StreetConfig(Config):
    kitchens: tuple[KitchenConfig, ...] = ()
    oven: OvenConfig | None = None


def test_unknown_keys_hide_no_other_mistake() -> None:
    values = {
        "kitchens": [{"address": "x"}, {"adress": "y", "oven": {"heat": 9, "heat_c": 300}}],
        "oven": {"colour": "red", "name": ""},
        "name": "Elm",
    }
    assert find_mistakes(StreetConfig, values) == [
        "kitchens.1: unknown key 'adress' (did you mean 'address'?); allowed: address, oven",
        "kitchens.1.oven: unknown key 'heat' (did you mean 'heat_c'?); allowed: heat_c, name",
        "oven: unknown key 'colour'; allowed: heat_c, name",
        "config: unknown key 'name'; allowed: kitchens, oven",
        "kitchens.1.address: Field required",
        "kitchens.1.oven.heat_c: Input should be less than or equal to 250, got 300",
        "oven.name: String should have at least 1 character, got ''",
    ]


def test_values_without_a_mistake_have_none() -> None:
    assert find_mistakes(StreetConfig, {"kitchens": [{"address": "x", "oven": {}}], "oven": None}) == []


def test_a_section_that_is_no_mapping_is_refused() -> None:
    assert "oven" in mistakes(KitchenConfig, {"address": "x", "oven": 3})[0]


def test_a_config_cannot_be_changed() -> None:
    oven = OvenConfig()
    with pytest.raises(ValidationError, match="frozen"):
        oven.heat_c = 200


@pytest.mark.parametrize("num_gpus", [0, 0.25, 1, 2, 8])
def test_gpus_are_shared_or_whole(num_gpus: float) -> None:
    assert ResourceConfig(num_gpus=num_gpus).num_gpus == num_gpus


@pytest.mark.parametrize("num_gpus", [1.5, 2.25])
def test_more_than_one_gpu_must_be_a_whole_number(num_gpus: float) -> None:
    assert f"got {num_gpus}" in mistakes(ResourceConfig, {"num_gpus": num_gpus})[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_cpus", -1),
        ("num_cpus", float("inf")),
        ("num_gpus", -0.5),
        ("min_replicas", -1),
        ("max_replicas", 0),
        ("max_ongoing_requests", 1),
        ("target_load", 0),
        ("upscale_delay_s", -1),
        ("downscale_delay_s", "soon"),
    ],
)
def test_a_resource_that_cannot_be_is_named(key: str, value: Any) -> None:
    [line] = mistakes(ResourceConfig, {key: value})
    assert line.startswith(f"{key}: ")
    assert line.endswith(f"got {value!r}")

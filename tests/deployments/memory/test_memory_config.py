"""Configs of memory techniques: one key for each, and clear errors for techniques that do not combine."""

from typing import Any

import pytest
from pydantic import ValidationError

from deployments.config.encoder import EncoderConfig
from deployments.config.stage import StageConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.memory.conflicts import ASKED, CONFLICTS, find_conflict


@pytest.mark.parametrize(
    ("settings", "whole"),
    [
        ({"quantization": "nf4"}, {"quantization": {"kind": "nf4"}}),
        ({"quantization": True}, {"quantization": {}}),
        ({"layerwise_casting": "float8_e5m2"}, {"layerwise_casting": {"storage_dtype": "float8_e5m2"}}),
        ({"compile": "model"}, {"compile": {"scope": "model"}}),
        ({"offload": "group"}, {"offload": {"kind": "group"}}),
        ({"offload": "none"}, {}),
        ({"time_sharing": 5}, {"time_sharing": {"time_slice_s": 5}}),
        ({"offload": False, "compile": False, "quantization": "none"}, {}),
    ],
    ids=str,
)
def test_a_single_value_stands_for_the_main_key(settings: dict[str, Any], whole: dict[str, Any]) -> None:
    assert StageConfig(**settings) == StageConfig(**whole)


def test_time_sharing_is_still_found_by_its_former_names() -> None:
    with pytest.warns(FutureWarning, match="now called"):
        assert StageConfig.model_validate({"on_demand": {"turn_s": 5}}) == StageConfig(time_sharing=5)
    with pytest.warns(FutureWarning, match="'on_demand' is now called 'time_sharing'"):
        assert StageConfig.model_validate({"on_demand": True}) == StageConfig(time_sharing=True)


def test_tiles_may_be_asked_for_by_their_size_alone() -> None:
    assert VaeConfig(tiling=512).tiling == VaeConfig(tiling={"tile_size": 512}).tiling
    assert VaeConfig(tiling=True).tiling is not None


def test_a_config_survives_being_written_down() -> None:
    config = TransformerConfig(quantization="nf4", offload={"kind": "model"}, compile=True)
    assert TransformerConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "nf5"}, "'nf4', 'fp4' or 'int8'"),
        ({"quantization": {"kind": "nf4", "double_quantt": True}}, "did you mean 'double_quant'"),
        ({"offload": {"kind": "model", "use_stream": True}}, "are only for offload: group"),
        ({"offload": {"kind": "group", "record_stream": True}}, "set use_stream: true"),
        ({"offload": {"kind": "sequential", "folder": "/tmp"}}, "group or disk, not for sequential"),
        ({"host_copy": "files"}, "needs vram_limit_gib or time_sharing"),
        ({"vram_limit_gib": -1}, "greater than or equal to 0"),
    ],
    ids=str,
)
def test_a_wrong_value_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StageConfig(**settings)


def test_a_stream_that_would_fetch_nothing_ahead_in_a_vae_is_refused() -> None:
    with pytest.raises(ValidationError, match="set level: block"):
        VaeConfig.model_validate({"offload": {"kind": "group", "use_stream": True}})


WAYS: dict[str, dict[str, Any]] = {
    "quantization": {"quantization": "int8"},
    "quantization: nf4 or fp4": {"quantization": "fp4"},
    "quantization: int8": {"quantization": "int8"},
    "layerwise_casting": {"layerwise_casting": True},
    "offload": {"offload": "model"},
    "offload: sequential or disk": {"offload": "disk"},
    "offload: sequential, group or disk": {"offload": "group"},
    "offload: group": {"offload": "group"},
    "offload: group without use_stream": {"offload": "group"},
    "offload: group by blocks": {"offload": {"kind": "group", "level": "block", "use_stream": True}},
    "offload: group with folder": {"offload": {"kind": "group", "folder": "/tmp"}},
    "host_copy: files": {"host_copy": "files", "time_sharing": True},
    "time_sharing": {"time_sharing": True},
    "channels_last": {"channels_last": True},
    "vram_limit_gib": {"vram_limit_gib": 2},
    "compile": {"compile": True},
    "compile: blocks": {"compile": {"scope": "blocks"}},
    "compile.fullgraph": {"compile": {"fullgraph": True}},
    "compile.mode with CUDA graphs": {"compile": {"mode": "reduce-overhead", "scope": "model"}},
    "trace": {"trace": True},
    "device_map": {"device_map": "auto"},
    "shards": {"shards": 2},
    "context_parallel": {"context_parallel": 2},
    "tensor_parallel": {"tensor_parallel": 2},
    "context_parallel or tensor_parallel": {"context_parallel": 2},
    "transport: object_store": {"transport": "object_store"},
    "shards with compile: model": {"shards": 2, "compile": {"scope": "model", "fullgraph": True}},
}
"""Settings that select each technique that conflicts name."""


@pytest.mark.parametrize("conflict", CONFLICTS, ids=lambda conflict: f"{conflict.one} + {conflict.other}")
def test_a_conflict_is_refused_with_both_names_and_a_way_out(conflict: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        TransformerConfig(**_both(WAYS[conflict.one], WAYS[conflict.other]))
    message = caught.value.errors()[0]["msg"]
    assert f"{conflict.one} and {conflict.other} do not combine" in message
    assert "use " in message or "leave out" in message


def _both(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Merges two settings; the values of `other` win."""
    shared = [key for key in one.keys() & other.keys() if isinstance(other[key], dict)]
    return one | other | {key: one[key] | other[key] for key in shared if isinstance(one[key], dict)}


def test_each_alone_is_no_conflict() -> None:
    assert set(WAYS) == set(ASKED)
    for name, settings in WAYS.items():
        config = TransformerConfig(**_plain(settings))
        assert ASKED[name](config) or name == "shards with compile: model"
        assert find_conflict(config) is None


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Removes fullgraph where it was set only to cause its conflict."""
    if settings.get("shards") and "compile" in settings:
        return settings | {"compile": {"scope": "model"}}
    return settings


@pytest.mark.parametrize(
    "settings",
    [
        {"quantization": "nf4", "compile": True, "offload": {"kind": "group", "use_stream": True}},
        {"quantization": "nf4", "offload": {"kind": "group", "folder": "/tmp"}},
        {"quantization": "int8", "offload": "model"},
        {"layerwise_casting": True, "vram_limit_gib": 4},
        {"compile": {"fullgraph": True}},
        {"shards": 2, "compile": True, "vram_limit_gib": 3},
        {"time_sharing": True, "quantization": "nf4", "compile": True},
        {"time_sharing": True, "vram_limit_gib": 3, "layerwise_casting": True},
    ],
    ids=str,
)
def test_what_the_guides_combine_is_allowed(settings: dict[str, Any]) -> None:
    TransformerConfig(**settings)


def test_the_other_stages_have_the_same_keys() -> None:
    settings = {"quantization": "nf4", "offload": "model", "dtype": "bfloat16"}
    assert EncoderConfig(**settings).quantization == VaeConfig(**settings).quantization

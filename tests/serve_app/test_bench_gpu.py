"""`relay bench gpu`: every way is a config that stands, sizes are the published ones, and bounds are judged."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ModelMixin

from deployments.checkpoints.source import fetch_checkpoint
from deployments.config import EncoderConfig, TransformerConfig, VaeConfig
from serve_app.bench.gpu import WAYS, Way, judge
from serve_app.bench.large import PUBLISHED, Settings, build_model, write_large

GIB = 1024.0


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in WAYS for name in WAYS[family]])
def test_every_way_is_a_config_without_conflicts(family: str, name: str) -> None:
    way = WAYS[family][name]
    kinds = {"encoder": EncoderConfig, "transformer": TransformerConfig, "vae": VaeConfig}
    for stage, settings in way.stages.items():
        assert kinds[stage](**settings).dtype == "bfloat16"
    assert way.faster_than is None or way.faster_than[0] in WAYS[family]


@pytest.mark.parametrize(
    ("family", "class_name", "num_parameters"),
    [("flux", "FluxTransformer2DModel", 11.901e9), ("qwen-image", "QwenImageTransformer2DModel", 20.430e9)],
)
def test_sizes_are_the_published_ones(family: str, class_name: str, num_parameters: float) -> None:
    """Counted once from the published configs (docs/memory.md)."""
    own: dict[str, Any] = {"guidance_embeds": True} if family == "flux" else {}
    with torch.device("meta"):
        model: ModelMixin = getattr(diffusers, class_name)(**own, **PUBLISHED[family]["transformer"])
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(num_parameters, rel=1e-3)


@pytest.mark.parametrize(
    ("family", "name", "settings"),
    [(family, name, settings) for family, parts in PUBLISHED.items() for name, settings in parts.items()],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_model_of_published_size_can_be_built(family: str, name: str, settings: Settings) -> None:
    """Text encoders and VAEs too, each from the tiny checkpoint's config."""
    with torch.device("meta"):
        model = build_model(fetch_checkpoint(f"tiny://{family}", ()), name, settings)
    assert sum(parameter.numel() for parameter in model.parameters()) > 5e7


def test_a_checkpoint_of_other_sizes_is_written_in_bf16(tmp_path: Path) -> None:
    sizes = {"transformer": {"num_layers": 1}, "text_encoder_2": {"num_layers": 3}}
    write_large("flux", tmp_path / "flux", sizes, torch.device("cpu"))
    pipe: Any = diffusers.FluxPipeline.from_pretrained(tmp_path / "flux", dtype=torch.bfloat16)
    assert len(pipe.transformer.transformer_blocks) == 1
    assert len(pipe.text_encoder_2.encoder.block) == 3
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("way", "verdict"),
    [
        (Way({}), "-"),
        (Way({}, most_gib=10.0), "yes"),
        (Way({}, most_gib=9.0), "10.0 GiB, not 9"),
        (Way({}, limit_gib=4), "yes"),
        (Way({}, limit_gib=3), "4.0 GiB of weights, not 3"),
        (Way({}, faster_than=("slow", 1.5)), "yes"),
        (Way({}, faster_than=("slow", 2.5), most_gib=10.0), "2.00 times as fast as slow, not 2.5"),
        (Way({}, faster_than=("failed", 2.5)), "failed did not run"),
    ],
    ids=str,
)
def test_bounds_are_judged(way: Way, verdict: str) -> None:
    of = {"peak_mib": 10 * GIB, "p50_s": 2.0, "limited_mib": 4 * GIB}
    assert judge(way, of, {"slow": {"p50_s": 4.0}, "failed": {"error": "no"}}) == verdict

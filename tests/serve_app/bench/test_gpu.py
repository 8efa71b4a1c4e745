"""Tests of `relay bench gpu`: its configs are valid, model sizes are the published ones, bounds are checked."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ModelMixin
from safetensors.torch import load_file

from deployments.checkpoints.source import fetch_checkpoint
from deployments.config.encoder import EncoderConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from serve_app.bench.draw import OutOfTime
from serve_app.bench.gpu import WAYS, Way, judge
from serve_app.bench.large import PUBLISHED, Settings, build_model, write_large
from serve_app.bench.memory import measure

GIB = 1024.0
CPU = torch.device("cpu")


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
    """The expected numbers were counted from the published configs (docs/memory.md)."""
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
    """Includes text encoders and VAEs, each built from the tiny checkpoint's config."""
    with torch.device("meta"):
        model = build_model(fetch_checkpoint(f"tiny://{family}", ()), name, settings)
    assert sum(parameter.numel() for parameter in model.parameters()) > 5e7


SMALL: dict[str, dict[str, Any]] = {
    "transformer": {"num_layers": 1},
    "text_encoder": {"num_hidden_layers": 1},
    "text_encoder_2": {"num_layers": 3},
    "vae": {"layers_per_block": 2},
}


def test_a_checkpoint_of_other_sizes_is_written_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each model is written in several files, some models into a second folder that stands for host memory."""
    monkeypatch.setattr("serve_app.bench.draw.PART_BYTES", 100_000)
    monkeypatch.setattr("serve_app.bench.large.SPARE_BYTES", 0)  # independent of the machine's other use of memory
    memory = tmp_path / "memory"
    memory.mkdir()
    write_large("flux", tmp_path / "flux", SMALL, torch.device("cpu"), in_memory=memory)
    assert {path.name for path in memory.iterdir()} == SMALL.keys()
    assert len(list((memory / "transformer").glob("*.safetensors"))) > 1
    pipe: Any = diffusers.FluxPipeline.from_pretrained(tmp_path / "flux", dtype=torch.bfloat16)
    assert len(pipe.transformer.transformer_blocks) == 1
    assert len(pipe.text_encoder_2.encoder.block) == 3
    assert torch.get_default_dtype() == torch.float32
    stored = load_file(next((memory / "transformer").glob("*.safetensors")))
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_what_is_written_draws_finite_pictures(tmp_path: Path) -> None:
    write_large("qwen-image", tmp_path / "qwen", {"transformer": {}, "text_encoder": {}, "vae": {}}, CPU)
    pipe: Any = diffusers.QwenImagePipeline.from_pretrained(tmp_path / "qwen", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pixels = pipe("a cat", width=64, height=64, num_inference_steps=2, output_type="pt").images
    assert pixels.isfinite().all()
    assert pixels.std() > 0


def test_what_finds_no_room_says_how_much_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(OSError, match=r"transformer takes .* GB, but .* has 0 GB free.* set TMPDIR"):
        write_large("flux", tmp_path / "flux", SMALL, CPU, in_memory=tmp_path)


def test_writing_ends_in_time(tmp_path: Path) -> None:
    with pytest.raises(OutOfTime, match="FluxTransformer2DModel was not written in time"):
        write_large("flux", tmp_path / "flux", SMALL, CPU, deadline=0.0)


def test_a_way_that_takes_too_long_is_cut_off_with_all_that_it_has_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A compiler process that the way has started would otherwise keep its output open."""
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nsleep 60 &\nsleep 60\n")
    slow.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(slow))
    began = time.monotonic()
    assert measure({}, timeout_s=0.5) == {"error": "not done within 0.5 s"}
    assert time.monotonic() - began < 10


def test_a_way_tells_the_published_figure() -> None:
    assert Way({}, most_gib=14.9, faster_than=("nf4", 1.26)).published == "14.9 GiB, 1.26 times as fast as nf4"


@pytest.mark.parametrize(
    ("way", "verdict"),
    [
        (Way({}), "-"),
        (Way({}, most_gib=10.0), "yes"),
        (Way({}, most_gib=9.0), "10.0 GiB, but at most 9 allowed"),
        (Way({}, limit_gib=4), "yes"),
        (Way({}, limit_gib=3), "4.0 GiB of weights, but at most 3 allowed"),
        (Way({}, faster_than=("slow", 1.5)), "yes"),
        (
            Way({}, faster_than=("slow", 2.5), most_gib=10.0),
            "2.00 times as fast as slow, but at least 2.5 required",
        ),
        (Way({}, faster_than=("failed", 2.5)), "failed did not run"),
    ],
    ids=str,
)
def test_bounds_are_judged(way: Way, verdict: str) -> None:
    of = {"peak_mib": 10 * GIB, "p50_s": 2.0, "limited_mib": 4 * GIB}
    assert judge(way, of, {"slow": {"p50_s": 4.0}, "failed": {"error": "no"}}) == verdict

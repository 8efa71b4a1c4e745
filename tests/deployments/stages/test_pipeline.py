"""The parts of a checkpoint that each stage loads."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from deployments.checkpoints.components import Stage, fetch_stage
from deployments.checkpoints.source import fetch_checkpoint
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.stage import StageConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.families import FAMILIES
from deployments.stages import load_stage
from deployments.stages.pipeline import load_pipeline, loaded_models

CONFIGS = {"encode": EncoderConfig(), "denoise": TransformerConfig(), "decode": VaeConfig()}


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_is_named_is_loaded(family: str) -> None:
    """Wan's transformer is an optional part of its pipeline, so diffusers would load it in every stage."""
    folder, index = fetch_stage(
        ModelConfig(name="tiny", checkpoint=f"tiny://{family}", family=family), "decode", "float32"
    )
    pipe = load_pipeline(folder, index, frozenset({"vae"}), StageConfig(), variant=None)
    assert set(loaded_models(pipe)) == {"vae"}


@pytest.mark.parametrize(
    ("stage", "component", "described", "told"),
    [
        (
            "encode",
            "text_encoder",
            {"num_hidden_layers": 3},
            "text_encoder lacks weights that CLIPTextModel",
        ),
        ("encode", "text_encoder_2", {"num_layers": 3}, "text_encoder_2 lacks weights that T5EncoderModel"),
        (
            "encode",
            "text_encoder_2",
            {"d_ff": 128},
            "wi_0.weight has the shape [64, 64], but T5EncoderModel",
        ),
        ("decode", "vae", {"layers_per_block": 2}, "vae lacks weights that AutoencoderKL"),
        (
            "denoise",
            "transformer",
            {"num_layers": 5},
            "transformer lacks weights that FluxTransformer2DModel",
        ),
        ("denoise", "transformer", {"num_layers": "two"}, "config.json does not describe FluxTransformer2DModel"),
    ],
)
def test_weights_that_are_not_of_the_model_that_its_config_describes_are_refused(
    tmp_path: Path, stage: Stage, component: str, described: dict[str, Any], told: str
) -> None:
    """transformers would set missing weights to random values, other ones in each replica."""
    folder = Path(shutil.copytree(fetch_checkpoint("tiny://flux", ()), tmp_path / "flux"))
    config = folder / component / "config.json"
    before = json.loads(config.read_text())
    assert all(before[key] != value for key, value in described.items())
    config.write_text(json.dumps(before | described))
    with pytest.raises(ValueError, match=re.escape(told)):
        load_stage(stage, ModelConfig(name="t", checkpoint=str(folder), family="flux"), CONFIGS[stage])

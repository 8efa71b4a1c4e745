"""Checks which checkpoints have the same models for a stage."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from deployments.checkpoints.components import Stage
from deployments.checkpoints.sharing import NotTheSame, check_same
from deployments.checkpoints.source import fetch_checkpoint
from deployments.config.model import ModelConfig
from tests.deployments.derived_here import with_family_here


def of(checkpoint: str | Path, name: str = "other") -> ModelConfig:
    return with_family_here(ModelConfig(name=name, checkpoint=str(checkpoint)))


FLUX = of("tiny://flux", "flux")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of FLUX's folder: other files with equal contents."""
    return Path(shutil.copytree(fetch_checkpoint("tiny://flux", ()), tmp_path / "copy"))


@pytest.mark.parametrize("stage", ["encode", "decode"])
def test_models_are_the_same_by_what_their_files_hold(copy: Path, stage: Stage) -> None:
    check_same(FLUX, of(copy), stage, "float32")


@pytest.mark.parametrize("stage", ["encode", "decode"])
def test_pipelines_of_two_classes_may_have_the_same_models(stage: Stage) -> None:
    check_same(FLUX, of("tiny://flux-kontext"), stage, "float32")


def test_where_a_config_comes_from_does_not_matter(copy: Path) -> None:
    file = copy / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_name_or_path": "elsewhere"}))
    check_same(FLUX, of(copy), "decode", "float32")


def test_one_number_of_the_weights_makes_another_model(copy: Path) -> None:
    [file] = (copy / "text_encoder").glob("*.safetensors")
    weights = load_file(file)
    first = min(weights)
    weights[first] = weights[first] + (weights[first] == weights[first].max())
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(NotTheSame, match=r"text_encoder of 'flux' and of 'other' differ in their weights: .*flux"):
        check_same(FLUX, of(copy), "encode", "float32")
    check_same(FLUX, of(copy), "decode", "float32")


def test_a_setting_makes_another_model(copy: Path) -> None:
    file = copy / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shift_factor": 0.5}))
    with pytest.raises(NotTheSame, match=r"vae of .* differ in config.json, shift_factor: 0\.\d+, 0\.5"):
        check_same(FLUX, of(copy), "decode", "float32")


def test_stages_of_other_models_are_not_the_same() -> None:
    with pytest.raises(NotTheSame, match=r"has text_encoder, text_encoder_2 in it, and .* text_encoder_3"):
        check_same(FLUX, of("tiny://sd3"), "encode", "float32")

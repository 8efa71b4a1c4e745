"""What of a checkpoint each stage loads."""

import pytest

from deployments.checkpoints.components import fetch_stage
from deployments.config import ModelConfig, StageConfig
from deployments.families import FAMILIES
from deployments.stages.pipeline import load_pipeline, loaded_models


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_is_named_is_loaded(family: str) -> None:
    """Wan's transformer is an optional part of its pipeline, and came along to every stage."""
    folder, index = fetch_stage(ModelConfig(name="tiny", checkpoint=f"tiny://{family}", family=family), "decode")
    pipe = load_pipeline(folder, index, frozenset({"vae"}), StageConfig(), variant=None)
    assert set(loaded_models(pipe)) == {"vae"}

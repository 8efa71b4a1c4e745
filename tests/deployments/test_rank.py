"""A rank after the first, as a plain object without a cluster."""

import os

import pytest

from deployments.config import ModelConfig, TransformerConfig
from deployments.rank import Rank

MODEL = ModelConfig(name="tiny", checkpoint="tiny://flux")


@pytest.mark.parametrize("said", [None, "LAZY"])
def test_kernels_are_loaded_early_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, said: str | None
) -> None:
    monkeypatch.setenv("CUDA_MODULE_LOADING", "LAZY")
    if said is None:
        monkeypatch.delenv("CUDA_MODULE_LOADING")
    Rank(1, MODEL, "flux", TransformerConfig(shards=2))
    assert os.environ["CUDA_MODULE_LOADING"] == (said or "EAGER")

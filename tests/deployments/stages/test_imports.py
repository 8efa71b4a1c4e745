"""The packages that a replica imports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.config.model import ModelConfig
from deployments.stages.imports import stored_methods

PROGRAM = """
import sys
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.stages import load_stage
load_stage("encode", ModelConfig(name="t", checkpoint="tiny://flux", family="flux"), EncoderConfig())
print(*(sys.modules[name] for name in ("bitsandbytes", "gguf", "torchao")))
"""


def test_a_stage_without_quantised_weights_does_without_what_reads_them() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "None None None"


@pytest.mark.parametrize(
    ("config", "methods"),
    [
        ({}, set()),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, {"bitsandbytes"}),
        ({"quantization_config": {"load_in_8bit": True}}, {""}),
        ({"quantization_config": {"quant_method": "torchao"}}, {"torchao"}),
    ],
)
def test_a_checkpoint_that_is_stored_quantised_is_known_by_its_configs(
    tmp_path: Path, config: dict[str, object], methods: set[str]
) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    assert stored_methods(ModelConfig(name="t", checkpoint=str(tmp_path))) == methods

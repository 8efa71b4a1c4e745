"""What a fork server imports for the stages, in processes of their own."""

import os
import subprocess
import sys
from typing import Any

import pytest

from cluster.forked_worker import SERVER_ENV
from deployments.config import EncoderConfig, ModelConfig
from deployments.stages.preload import plan_preload

PRELOADED = """
import os, sys
from cluster.fork_server import preload
from deployments.config import EncoderConfig, ModelConfig, TransformerConfig, VaeConfig
from deployments.stages import load_stage
from deployments.stages.preload import plan_preload
model = ModelConfig(name="t", checkpoint="tiny://flux", family="flux")
preload(*plan_preload(model, EncoderConfig()))
print(len(os.listdir("/proc/self/task")))
before = set(sys.modules)
load_stage("encode", model, EncoderConfig())
load_stage("denoise", model, TransformerConfig())
load_stage("decode", model, VaeConfig())
print(*sorted(name for name in set(sys.modules) - before if name.split(".")[0] in ("torch", "diffusers")))
try:
    load_stage("encode", model, EncoderConfig(quantization="nf4"))
except Exception as error:
    print(error)
"""


@pytest.fixture(scope="module")
def told() -> list[str]:
    command = [sys.executable, "-c", PRELOADED]
    run = subprocess.run(command, env=os.environ | SERVER_ENV, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_imports_start_no_threads_which_a_fork_would_lose(told: list[str]) -> None:
    assert told[0] == "1"


def test_stages_import_nothing_more_of_torch_and_diffusers(told: list[str]) -> None:
    assert told[1] == ""


def test_a_stage_that_needs_what_was_skipped_says_so(told: list[str]) -> None:
    assert "needs bitsandbytes here, and where the app was built it did not" in told[2]


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ({}, {"quantization": "nf4"}),
        ({"components": {"transformer": "/models/flux1-dev-Q4_K_S.gguf"}}, {}),
        ({"checkpoint": "/no/such/checkpoint"}, {}),
    ],
    ids=["quantised here", "stored quantised", "elsewhere"],
)
def test_a_stage_that_may_need_more_imports_for_itself(model: dict[str, Any], config: dict[str, Any]) -> None:
    base = {"name": "t", "checkpoint": "tiny://flux", "family": "flux"}
    assert plan_preload(ModelConfig(**base | model), EncoderConfig(**config)) is None

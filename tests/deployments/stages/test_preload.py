"""The modules that a fork server imports for the stages, tested in separate processes."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from cluster.forked_worker import SERVER_ENV
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.stages.preload import plan_preload
from tests.thorough import usually

PRELOADED = """
import json, os, sys
from cluster.fork_server import preload
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.stages import load_stage
from deployments.stages.preload import plan_preload
model = ModelConfig(name="t", checkpoint="tiny://flux", family="flux", **json.loads(sys.argv[1]))
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
print(*(name for name in ("bitsandbytes", "peft") if sys.modules.get(name)))
"""


@pytest.fixture(scope="module", params=usually([True, False], bool), ids=["with adapters", "without"])
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    model = {"adapters_folder": str(tmp_path_factory.mktemp("adapters"))} if request.param else {}
    command = [sys.executable, "-c", PRELOADED, json.dumps(model)]
    run = subprocess.run(command, env=os.environ | SERVER_ENV, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_imports_start_no_threads_which_a_fork_would_lose(told: list[str]) -> None:
    assert told[0] == "1"


def test_stages_import_nothing_more_of_torch_and_diffusers(told: list[str]) -> None:
    assert told[1] == ""


def test_adapters_bring_their_package_and_no_other(told: list[str], request: pytest.FixtureRequest) -> None:
    assert told[3] == ("peft" if "with adapters" in request.node.name else "")


def test_a_stage_that_needs_what_was_skipped_says_so(told: list[str]) -> None:
    assert "needs bitsandbytes here, but did not where the app was built" in told[2]


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

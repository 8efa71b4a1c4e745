"""Tests that another transformer goes on after one dies at step 18 of 20, and draws the same image."""

import base64
import io
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ray import serve

from deployments.config.transformer import TransformerConfig
from deployments.transformer import Transformer
from serve_app.jobs.config import JobsConfig
from tests.app import App

NUM_STEPS, DIES_AT, EVERY = 20, 18, 4
STEP_S = 0.05
"""Seconds by which each step is delayed, so that predictions are saved before the next ones are due."""
PATIENCE_S = 120.0
PROMPT = "a red fox"


class Dying(Transformer):
    """A transformer that kills itself at step DIES_AT, once for every seed."""

    def __init__(self, marks: str, *given: Any) -> None:
        super().__init__(*given)
        self._marks = Path(marks)

    def _denoise(self, seat: Any, given: Any, request: Any, options: Any, events: Any, *journal: Any) -> Any:
        told, mark = events.on_step, self._marks / str(request.seed)

        def on_step(step: int, latents: Any = None) -> None:
            told(step, latents)
            time.sleep(STEP_S)
            if step == DIES_AT and not mark.exists():
                mark.touch()
                time.sleep(10 * STEP_S)
                os.kill(os.getpid(), signal.SIGKILL)

        events.on_step = on_step
        return super()._denoise(seat, given, request, options, events, *journal)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder for the files of jobs."""
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def dying_app(
    flux_app: App, start_ingress: Callable[..., App], tmp_path_factory: pytest.TempPathFactory, files: Path
) -> Iterator[App]:
    marks = tmp_path_factory.mktemp("marks")
    config = TransformerConfig.model_validate({"resume": {"every_steps": EVERY, "every_s": 0.0}})
    transformer = serve.deployment(Dying).options(
        name="Transformer", health_check_period_s=1, ray_actor_options={"num_cpus": 0.1}
    )
    jobs = JobsConfig(database=f"sqlite:///{marks}/jobs.db", files=str(files))
    app = start_ingress("dying", transformer=transformer.bind(str(marks), flux_app.model, config), jobs=jobs)
    yield app
    serve.delete("dying")


def num_forwards(app: App) -> int:
    """Returns the number of forwards of the replica that is alive."""
    sizes = app.deployment("Transformer").stats.remote().result().queue.batch_sizes
    return sum(size * number for size, number in sizes.items())


def drawn(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def right_picture(plain: Callable[..., Any], seed: int) -> np.ndarray:
    return np.asarray(plain("flux", PROMPT, seed=seed, num_inference_steps=NUM_STEPS))


@pytest.mark.thorough
def test_at_most_the_periods_steps_are_computed_again(dying_app: App, plain: Callable[..., Any]) -> None:
    body = {"prompt": PROMPT, "seed": 7, "num_inference_steps": NUM_STEPS, "stream": True, "progress": True}
    steps, data = [], b""
    with dying_app.client.stream("POST", "/v1/images/generations", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                if event.get("phase") == "denoise":
                    steps.append(event["step"])
                data = base64.b64decode(event.get("b64_json", "")) or data
    assert num_forwards(dying_app) == NUM_STEPS - DIES_AT // EVERY * EVERY
    np.testing.assert_array_equal(drawn(data), right_picture(plain, 7))
    assert all(back >= step - EVERY for step, back in pairwise(steps))


@pytest.mark.thorough
def test_a_job_goes_on_from_its_files(dying_app: App, plain: Callable[..., Any], files: Path) -> None:
    body = {"prompt": PROMPT, "seed": 8, "num_inference_steps": NUM_STEPS, "background": True}
    job = dying_app.client.post("/v1/images/generations", json=body).raise_for_status().json()
    kept: set[str] = set()
    deadline = time.monotonic() + PATIENCE_S
    while (told := dying_app.client.get(f"/v1/images/jobs/{job['id']}").json())["status"] != "completed":
        kept.update(path.name for path in files.glob("*/*.steps"))
        assert time.monotonic() < deadline, told
        time.sleep(0.02)
    assert {f"0-0000{i}.steps" for i in range(DIES_AT // EVERY)} <= kept
    assert num_forwards(dying_app) == NUM_STEPS - DIES_AT // EVERY * EVERY
    content = dying_app.client.get(f"/v1/images/jobs/{job['id']}/content").content
    np.testing.assert_array_equal(drawn(content), right_picture(plain, 8))
    while list(files.glob("*/*.steps")):
        assert time.monotonic() < deadline
        time.sleep(0.02)

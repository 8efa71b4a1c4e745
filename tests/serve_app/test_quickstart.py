"""The quickstart as `make serve` starts it, and its model as an oracle: a picture that belongs to another request
would be seen. The last test ends it.
"""

import base64
import io
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from deployments.checkpoints.shapes.grader import grade
from deployments.checkpoints.shapes.scene import random_scene
from deployments.checkpoints.shapes.wording import describe_unseen
from tests.relay_server import QUICKSTART, free_port, left_over, serving, wait_for

pytestmark = pytest.mark.slow

NUM_REQUESTS = 48
CONCURRENCY = 16


@dataclass(frozen=True)
class Server:
    """`relay serve`, its log, and who asks it."""

    process: "subprocess.Popen[bytes]"
    log: Path
    port: int
    client: httpx.Client


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("quickstart")
    port, log, config = free_port(), folder / "log", folder / "config.yaml"
    config.write_text(QUICKSTART)
    with serving(config, log, "--port", str(port), "--grace", "1") as process:
        wait_for(log, f"quickstart is ready: http://127.0.0.1:{port}/", process)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            yield Server(process, log, port, client)


def draw(client: httpx.Client, prompt: str, seed: int) -> np.ndarray:
    answer = client.post("/v1/images/generations", json={"prompt": prompt, "seed": seed})
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_sixteen_at_once_each_get_what_they_asked_for(server: Server) -> None:
    """Colour, place and background, every one: two mixed-up requests would show."""
    rng = np.random.default_rng(3)
    scenes = [random_scene(rng, is_held_out=True) for _ in range(NUM_REQUESTS)]
    prompts = [describe_unseen(scene, rng) for scene in scenes]
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        pictures = list(pool.map(lambda i: draw(server.client, prompts[i], seed=i), range(NUM_REQUESTS)))
    grades = [grade(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    wrong = [
        prompt
        for prompt, graded in zip(prompts, grades, strict=True)
        if not (graded.color and graded.place and graded.background)
    ]
    assert wrong == []


def test_at_sigterm_it_cuts_what_runs_over_its_grace_and_leaves_nothing(server: Server) -> None:
    long = {"prompt": "a cat", "size": "1024x1024", "num_inference_steps": 150}
    errors: list[Exception] = []

    def ask() -> None:
        try:
            server.client.post("/v1/images/generations", json=long, timeout=300)
        except httpx.TransportError as error:
            errors.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(2)
    children = psutil.Process(server.process.pid).children(recursive=True)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=60) == 0
    asking.join(timeout=30)
    text = server.log.read_text()
    assert (len(errors), left_over(children, after_s=5)) == (1, [])
    assert "relay: encoder: ready" in text
    assert "1 request in progress: 1 s more" in text
    assert "graceful_shutdown" not in text
    assert text.rstrip().endswith("relay: ending")
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended may linger
        again.bind(("127.0.0.1", server.port))

"""Tests of the quickstart as a new user starts it: by name, in an empty folder, with the installed wheel.

Its images can be compared with their prompts, so an image that belongs to another request is noticed. The last
test ends the server.
"""

import base64
import io
import re
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

from deployments.training.shapes.grader import grade
from deployments.training.shapes.scene import random_scene
from deployments.training.shapes.wording import describe_unseen
from tests.relay_server import free_port, left_over, serving, wait_for
from tests.wheel import build_wheel, install_wheel

pytestmark = pytest.mark.slow

NUM_REQUESTS = 48
CONCURRENCY = 16


@dataclass(frozen=True)
class Server:
    """A process of `relay serve`, its log and a client."""

    process: "subprocess.Popen[bytes]"
    log: Path
    port: int
    client: httpx.Client


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("quickstart")
    relay = install_wheel(build_wheel(folder), folder / "venv") / "relay"
    port, log, empty = free_port(), folder / "log", folder / "empty"
    empty.mkdir()
    options = ("--port", str(port), "--grace", "1")
    with serving(Path("quickstart"), log, *options, relay=str(relay), cwd=empty) as process:
        wait_for(log, f"quickstart is ready: http://127.0.0.1:{port}/", process)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            yield Server(process, log, port, client)


def draw(client: httpx.Client, prompt: str, seed: int) -> np.ndarray:
    answer = client.post("/v1/images/generations", json={"prompt": prompt, "seed": seed})
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_the_page_is_there_with_all_that_it_loads(server: Server) -> None:
    page = server.client.get("/").text
    named = re.findall(r'(?:src|href)="([^"#:]+)"', page)
    assert {name.rpartition(".")[2] for name in named} >= {"css", "js"}
    assert [name for name in named if server.client.get(name).status_code != 200] == []


def test_sixteen_at_once_each_get_what_they_asked_for(server: Server) -> None:
    """Colour, place and background of every image are checked, so that mixed-up requests are noticed."""
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
    assert [line for line in text.splitlines() if not line.startswith("relay: ")] == []
    assert "1 request in progress: waiting up to 1 s" in text
    assert "graceful_shutdown" not in text
    assert text.rstrip().endswith("relay: stopping")
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended may linger
        again.bind(("127.0.0.1", server.port))

"""Clients that leave, stall, poll and half-ask, against the running app: nobody else is shut out, and every place
is given back. What is hostile in a single request is in test_bodies.py and test_proxy_middleware.py.
"""

import contextlib
import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from tests.conftest import ENDLESS, PATIENCE_S, App

pytestmark = pytest.mark.slow
PATH = "/v1/images/generations"
NUM_CROWD = 700


@pytest.fixture(scope="module")
def app(start_ingress: Callable[..., App]) -> App:
    return start_ingress("abused", max_num_inference_steps=ENDLESS, max_concurrent_requests=64)


def connect(app: App, *, buffer_bytes: int | None = None) -> socket.socket:
    connection = socket.socket()
    if buffer_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    connection.settimeout(PATIENCE_S)
    host, port = app.client.base_url.host, app.client.base_url.port
    assert port is not None
    connection.connect((host, port))
    return connection


def head(app: App, num_bytes: int) -> bytes:
    lines = (
        f"POST /{app.name}{PATH} HTTP/1.1",
        "host: relay",
        "content-type: application/json",
        f"content-length: {num_bytes}",
    )
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def ask(app: App, connection: socket.socket, **fields: Any) -> None:
    body = json.dumps({"prompt": "a cat"} | fields).encode()
    connection.sendall(head(app, len(body)) + body)


def wait_until_idle(app: App) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while app.status()["num_in_progress"]:
        assert time.monotonic() < deadline, "a request that nobody waits for is still in progress"
        time.sleep(0.1)


def draw(app: App) -> None:
    answer = app.client.post(PATH, json={"prompt": "a cat", "num_inference_steps": 1})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("half", ["body", "headers"])
def test_hundreds_of_half_requests_shut_nobody_out(app: App, half: str) -> None:
    sent = head(app, 1000) + b"{" if half == "body" else head(app, 1000)[:-2]
    with contextlib.ExitStack() as crowd:
        for _ in range(NUM_CROWD):
            crowd.enter_context(connect(app)).sendall(sent)
        draw(app)
        assert app.client.get("/health").status_code == 200
    wait_until_idle(app)


def test_streams_that_nobody_reads_hold_no_place_once_their_pictures_are_done(flux_app: App, app: App) -> None:
    wishes = {"stream": True, "partial_images": 3, "progress": True, "size": "128x128", "num_inference_steps": 2}
    with contextlib.ExitStack() as crowd:
        for _ in range(60):
            ask(app, crowd.enter_context(connect(app, buffer_bytes=2**12)), **wishes)
        flux_app.wait_for_seats(0)
        wait_until_idle(app)
        draw(app)


def leave(app: App, after_s: float, **fields: Any) -> None:
    with connect(app) as connection:
        ask(app, connection, num_inference_steps=ENDLESS, **fields)
        time.sleep(after_s)


@pytest.fixture(autouse=True)
def every_seat_is_given_back(flux_app: App, app: App) -> Iterator[None]:
    """First the ingress's, then the transformer's: which of the two holds one is told."""
    yield
    wait_until_idle(app)
    flux_app.wait_for_seats(0)


@pytest.fixture
def neighbours(app: App, every_seat_is_given_back: None) -> Iterator[None]:
    """Six who draw all the time."""
    done = False

    def neighbour() -> None:
        while not done:
            draw(app)

    with ThreadPoolExecutor(6) as pool:
        drawn = [pool.submit(neighbour) for _ in range(6)]
        try:
            yield
        finally:
            done = True
        for each in drawn:
            each.result()


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.usefixtures("neighbours")
def test_whoever_leaves_gives_all_his_seats_back_whenever_he_does(app: App, is_stream: bool) -> None:
    """Before his request is taken, while it waits for the encoder, while it is drawn."""
    random.seed(0)
    for _ in range(12):
        leave(app, random.choice([0.0, 0.02, 0.05, 0.1, 0.3]), n=10, stream=is_stream)


@pytest.mark.usefixtures("neighbours")
def test_forty_pollers_ask_the_replicas_once_a_second_in_all(app: App) -> None:
    """While pictures are drawn, every look at the transformer finds another number of micro-batches."""
    began = time.monotonic()

    def poll(path: str) -> list[str]:
        answers = []
        while time.monotonic() - began < 4:
            answer = app.client.get(path)
            assert answer.status_code == 200
            answers.append(answer)
        return [json.dumps(answer.json()["transformer"]["replicas"]) for answer in answers if "status" in path]

    with ThreadPoolExecutor(40) as pool:
        polled = [pool.submit(poll, path) for path in ["/v1/status"] * 20 + ["/health"] * 20]
        told = [each for poller in polled for each in poller.result()]
    assert len(told) > 40
    assert 2 <= len(set(told)) <= time.monotonic() - began + 2


def test_an_ingress_that_is_killed_costs_no_request(app: App) -> None:
    def draw_long() -> int:
        return app.client.post(PATH, json={"prompt": "a cat", "num_inference_steps": 200}).status_code

    with ThreadPoolExecutor(4) as pool:
        drawn = [pool.submit(draw_long) for _ in range(4)]
        time.sleep(1.0)
        title = f"ServeReplica:{app.name}:Ingress"
        [ingress] = [p for p in psutil.process_iter(["cmdline"]) if title in " ".join(p.info["cmdline"] or ())]
        ingress.kill()
        assert [each.result() for each in drawn] == [200] * 4

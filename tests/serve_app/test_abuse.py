"""Tests, on a running app, of clients that leave, stall, poll or send half a request: others are served, and every
seat is freed.

test_bodies.py and test_proxy_middleware.py test single hostile requests.
"""

import contextlib
import json
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from tests.app import PATIENCE_S, App
from tests.connections import PATH, ask, connect, head
from tests.keyed_app import ENDLESS, FOREVER_S

pytestmark = pytest.mark.slow
NUM_CROWD = 700


@pytest.fixture(scope="module")
def app(start_ingress: Callable[..., App]) -> App:
    limits = {"max_num_inference_steps": ENDLESS, "request_timeout_s": FOREVER_S}
    return start_ingress("abused", max_concurrent_requests=64, **limits)


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
        for _ in range(24):
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
    """Checks the ingress first, then the transformer: the error says which of them still holds a seat."""
    yield
    wait_until_idle(app)
    flux_app.wait_for_seats(0)


@pytest.fixture
def neighbours(app: App, every_seat_is_given_back: None) -> Iterator[None]:
    """Six clients that send requests all the time."""
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
    """Clients leave before their request is accepted, while it waits for the encoder, or while it is denoised."""
    random.seed(0)
    for _ in range(12):
        leave(app, random.choice([0.0, 0.02, 0.05, 0.1, 0.3]), n=10, stream=is_stream)


@pytest.mark.usefixtures("neighbours")
def test_forty_pollers_ask_the_replicas_once_a_second_in_all(app: App) -> None:
    """While images are drawn, every look at the transformer finds a different number of micro-batches."""
    began = time.monotonic()

    def poll(path: str) -> list[str]:
        answers: list[Any] = []
        while time.monotonic() - began < 4 or len(answers) < 3:
            answer = app.client.get(path)
            assert answer.status_code == 200
            answers.append(answer)
        return [json.dumps(answer.json()["transformer"]["replicas"]) for answer in answers if "status" in path]

    with ThreadPoolExecutor(40) as pool:
        polled = [pool.submit(poll, path) for path in ["/v1/status"] * 20 + ["/health"] * 20]
        told = [each for poller in polled for each in poller.result()]
    assert len(told) > 40
    assert 2 <= len(set(told)) <= time.monotonic() - began + 2


def drop(app: App, seed: int) -> None:
    """Sends a request; disconnects before the body, in its middle, after it, or in the middle of the answer."""
    chance = random.Random(seed)
    is_stream = chance.random() < 0.5
    body = json.dumps(
        {"prompt": "a cat", "num_inference_steps": ENDLESS, "n": chance.randint(1, 3)}
        | ({"stream": True, "progress": True} if is_stream else {})
    ).encode()
    text = head(app, len(body)) + body
    cut = chance.choice([len(head(app, len(body))), chance.randrange(len(text)), len(text), len(text)])
    with connect(app) as connection, contextlib.suppress(ConnectionError, TimeoutError):
        connection.sendall(text[:cut])
        leaves = time.monotonic() + chance.choice([0.001, 0.05, 0.3, 1.0])
        while (left_s := leaves - time.monotonic()) > 0:
            connection.settimeout(left_s)
            if not connection.recv(2**16):
                break


@pytest.mark.parametrize("num", [30, pytest.param(1000, marks=pytest.mark.thorough)])
def test_connections_that_drop_at_any_moment_leave_nothing_that_runs(app: App, num: int) -> None:
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda seed: drop(app, seed), range(num)))
    wait_until_idle(app)
    deadline = time.monotonic() + PATIENCE_S
    while (left := still_at_work(app)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    draw(app)


def still_at_work(app: App) -> list[str]:
    """Returns all counts of unfinished work, of the ingress and the stages, that are not zero."""
    told = app.status()
    counts = {"ingress": told["num_in_progress"], "work": told["queue_s"]}
    for stage in ("encoder", "vae"):
        counts[stage] = sum(replica["num_in_flight"] for replica in told[stage]["replicas"])
    queues = [replica["queue"] for replica in told["transformer"]["replicas"]]
    counts |= {name: sum(queue[name] for queue in queues) for name in ("num_seats", "num_waiting", "num_running")}
    return [f"{name}: {count}" for name, count in counts.items() if count]


def test_an_overload_is_told_when_there_will_be_room(narrow_app: App) -> None:
    """Retry-After is computed from the time of an equal request, which was measured before."""
    asked = {"prompt": "a cat", "num_inference_steps": 100, "size": "96x80"}  # no other test measures this size
    began = time.monotonic()
    assert narrow_app.client.post(PATH, json=asked).status_code == 200
    took_s = time.monotonic() - began
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(narrow_app.client.post, PATH, json=asked)
        while narrow_app.status()["num_in_progress"] == 0:
            time.sleep(0.05)
        refused = narrow_app.client.post(PATH, json=asked)
        assert running.result().status_code == 200
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "overloaded"
    assert 1 <= int(refused.headers["Retry-After"]) <= took_s + 1


@pytest.mark.thorough
def test_each_ingress_knows_what_the_others_have(start_ingress: Callable[..., App]) -> None:
    """Whichever ingress answers, its queue_s includes the single request that one of them has."""
    limits = {"max_num_inference_steps": ENDLESS, "request_timeout_s": FOREVER_S}
    pair = start_ingress("paired", num_replicas=2, **limits)
    with ThreadPoolExecutor(4) as pool:  # so that both ingresses have measured an image
        list(pool.map(lambda _: draw(pair), range(24)))
    with connect(pair) as connection:
        ask(pair, connection, num_inference_steps=ENDLESS)
        deadline, num_seen = time.monotonic() + PATIENCE_S, 0
        while num_seen < 12:
            assert time.monotonic() < deadline
            num_seen = num_seen + 1 if pair.client.get("/v1/status").json()["queue_s"] > 0 else 0
            time.sleep(0.1)


def test_a_deadline_that_cannot_be_met_is_refused_before_it_costs_anything(hasty_app: App) -> None:
    """The first request measures how long a step takes: one second is too little for so many steps."""
    asked = {"prompt": "a cat", "size": "80x80"}
    deadline = time.monotonic() + PATIENCE_S
    while hasty_app.client.post(PATH, json=asked | {"num_inference_steps": 1}).status_code != 200:
        assert time.monotonic() < deadline
    refused = hasty_app.client.post(PATH, json=asked | {"num_inference_steps": ENDLESS})
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "deadline_unmeetable"
    assert int(refused.headers["Retry-After"]) >= 1


@pytest.mark.thorough
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

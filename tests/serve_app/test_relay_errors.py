"""Tests of errors: their form, and that they are the same in another process."""

import pickle
import threading
import time

import httpx2
import pytest
from openai import APIStatusError, DefaultHttpxClient, OpenAI
from ray.exceptions import RayTaskError

from serve_app.errors import (
    BadCall,
    BadRequest,
    ClientLeft,
    DeadlineExceeded,
    OverLimit,
    Overloaded,
    RelayError,
    StageFailed,
    Unauthorized,
    Unavailable,
    UnknownJob,
    UnknownModel,
)

ERRORS = [
    (BadCall("no such path"), 400, None),
    (BadRequest("wrong size", "size"), 400, "size"),
    (Unauthorized("no key"), 401, None),
    (UnknownModel("no such model"), 404, "model"),
    (UnknownJob("no such job"), 404, None),
    (OverLimit("too many a minute", 5), 429, None),
    (Overloaded("too many"), 429, None),
    (ClientLeft("it has left"), 499, None),
    (StageFailed("it raised"), 500, None),
    (Unavailable("it is lost"), 503, None),
    (DeadlineExceeded("too late"), 504, None),
]

every_error = pytest.mark.parametrize(
    ("error", "status", "param"), ERRORS, ids=[type(error).__name__ for error, *_ in ERRORS]
)


def test_every_error_is_in_the_list() -> None:
    assert {type(error) for error, *_ in ERRORS} == set(RelayError.__subclasses__())


@every_error
def test_an_error_has_openais_form(error: RelayError, status: int, param: str | None) -> None:
    assert error.status == status
    body = error.body()["error"]
    assert body.keys() == {"message", "type", "param", "code"}
    assert (body["message"], body["param"]) == (str(error), param)
    assert body["type"] == ("invalid_request_error" if status in (400, 404, 499) else body["type"])


@every_error
def test_an_error_survives_pickling(error: RelayError, status: int, param: str | None) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert copy.body() == error.body()


@every_error
def test_what_ray_raises_for_an_error_says_what_the_error_says(
    error: RelayError, status: int, param: str | None
) -> None:
    """Ray raises an object of both classes, without calling the error's own constructor."""
    raised = RayTaskError("generate", "Traceback", error, "ray::Ingress", 1, "127.0.0.1").as_instanceof_cause()
    assert isinstance(raised, type(error))
    assert raised.body() == error.body()
    assert raised.headers() == error.headers()


@every_error
def test_openais_client_repeats_what_will_pass_and_nothing_else(
    error: RelayError, status: int, param: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    sleep, me = time.sleep, threading.current_thread()

    def wait(seconds: float) -> None:
        """Records this thread's waits; other threads really sleep."""
        (waits.append if threading.current_thread() is me else sleep)(seconds)

    monkeypatch.setattr(time, "sleep", wait)

    def answer(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(status, json=error.body(), headers=error.headers())

    http_client = DefaultHttpxClient(transport=httpx2.MockTransport(answer))
    with (
        OpenAI(base_url="http://relay/v1", api_key="none", http_client=http_client) as client,
        pytest.raises(APIStatusError),
    ):
        client.images.generate(prompt="a cat")
    assert waits == ([5, 5] if status in (429, 503) else [])


@pytest.mark.parametrize("error", [Overloaded("too many"), Unavailable("it is lost")])
def test_what_will_pass_says_when_to_come_back(error: RelayError) -> None:
    assert int(error.headers()["Retry-After"]) > 0

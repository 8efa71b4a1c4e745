"""Tests of the middleware of Serve's proxies, in a real uvicorn server and over real sockets."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app import proxy_middleware
from serve_app.http import connection as http_connection
from serve_app.http.connection import BoundedConnection
from serve_app.http.proxy_exit import ExitOnSigterm
from serve_app.proxy_middleware import ProxyMiddleware

NOT_FOUND = "Path '/x' not found. Ping http://.../-/routes for available routes."


class Proxy:
    """Stands for Serve's proxy: passes requests to an ingress, or answers with an error text without a length."""

    def __init__(self) -> None:
        self.routes: dict[str, str] = {"/": "relay"}
        self.num_lost = 0
        """How many of the next ingresses die before they answer."""
        self.own_words: tuple[int, str] | None = None
        self.seen: list[tuple[str, bytes, dict[str, str]]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/-/routes":
            await self._say(send, 200, json.dumps(self.routes), "application/json")
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self.seen.append((scope["path"], body, headers))
        scope["root_path"] += "/changed"
        if self.num_lost:
            self.num_lost -= 1
        elif self.own_words is not None:
            await self._say(send, *self.own_words)
        elif scope["path"] == "/busy":
            wait = [(b"retry-after", b"7"), (b"content-length", b"2"), (b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 429, "headers": wait})
            await send({"type": "http.response.body", "body": b"{}"})
        elif scope["path"] == "/large":
            await self._say(send, 200, "x" * 2**25, "application/octet-stream")
        else:
            answer = json.dumps({"root_path": scope["root_path"], "num_bytes": len(body)}).encode()
            length = (b"content-length", str(len(answer)).encode())
            await send({"type": "http.response.start", "status": 200, "headers": [length]})
            await send({"type": "http.response.body", "body": answer})

    async def _say(self, send: Send, status: int, text: str, kind: str = "text/plain; charset=utf-8") -> None:
        headers = [[b"content-type", kind.encode()], [b"X-Request-ID", b"abc"]]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode()})


Address = tuple[str, int]


@contextlib.contextmanager
def listening(app: ASGIApp) -> Iterator[Address]:
    config = uvicorn.Config(app, http=BoundedConnection, port=0, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = True
    thread.join()


@pytest.fixture
def proxy() -> Proxy:
    return Proxy()


@pytest.fixture
def address(proxy: Proxy) -> Iterator[Address]:
    with listening(ProxyMiddleware(proxy)) as where:
        yield where


@pytest.fixture
def client(address: Address) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{address[0]}:{address[1]}", timeout=60) as made:
        yield made


def ask(address: Address, data: bytes, *, patience_s: float = 10.0) -> bytes:
    """Returns all that the server answers until it closes. Raises TimeoutError if it does not close."""
    with socket.create_connection(address, timeout=patience_s) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused while it was sent
            connection.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(2**16):
                answer += piece
        return answer


def status_of(answer: bytes) -> int:
    """Returns the status of an answer. Asserts that it is an error in the API's form."""
    head, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert len(error["message"]) < 500
    return int(head.split(b" ")[1])


def test_what_is_ordinary_goes_through(client: httpx.Client) -> None:
    answer = client.post("/v1/images/generations", content=b"x" * 1000)
    assert answer.json() == {"root_path": "/changed", "num_bytes": 1000}


def test_a_body_longer_than_is_kept_arrives_whole(client: httpx.Client) -> None:
    num_bytes = 3 * proxy_middleware.MAX_BUFFERED_BYTES + 1
    assert client.post("/", content=b"x" * num_bytes).json()["num_bytes"] == num_bytes


@pytest.mark.parametrize(("method", "path"), [("POST", "/a/v1/images/generations"), ("GET", "/health")])
def test_a_request_whose_ingress_died_is_asked_again_as_it_was(
    proxy: Proxy, client: httpx.Client, method: str, path: str
) -> None:
    proxy.num_lost = proxy_middleware.MAX_REPEATS
    answer = client.request(method, path, content=b"body")
    assert answer.json() == {"root_path": "/changed", "num_bytes": 4}
    assert proxy.seen[0] == proxy.seen[-1]


def test_all_repeats_of_a_request_have_one_idempotency_key(proxy: Proxy, client: httpx.Client) -> None:
    """By the key, the second attempt finds what the first has begun."""
    keys = []
    for own in ({}, {}, {"idempotency-key": "the client's"}):
        proxy.num_lost, proxy.seen = 1, []
        assert client.post("/v1/videos", content=b"{}", headers=own).status_code == 200
        first, second = (headers["idempotency-key"] for _, _, headers in proxy.seen)
        assert first == second
        keys.append(first)
    assert len(set(keys)) == 3
    assert keys[2] == "the client's"


def test_a_request_and_its_repeats_are_one_to_whoever_counts_and_no_client_says_which(
    proxy: Proxy, client: httpx.Client
) -> None:
    """A client that could choose the id would be charged only once for all its requests."""
    told = []
    for _ in range(2):
        proxy.num_lost, proxy.seen = 1, []
        client.post("/v1/images/generations", content=b"{}", headers={"x-relay-request": "mine"})
        first, second = (headers["x-relay-request"] for _, _, headers in proxy.seen)
        assert first == second
        told.append(first)
    assert len({*told, "mine"}) == 3


def test_an_ingress_that_dies_again_and_again_is_a_503_in_the_apis_form(
    proxy: Proxy, client: httpx.Client
) -> None:
    proxy.num_lost = proxy_middleware.MAX_REPEATS + 1
    answer = client.post("/v1/images/generations", content=b"{}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert answer.headers["retry-after"] == "5"


def test_what_may_do_something_twice_is_not_repeated(proxy: Proxy, client: httpx.Client) -> None:
    proxy.num_lost = 1
    assert client.post("/somebody/elses", content=b"pay").status_code == 503
    assert len(proxy.seen) == 1


@pytest.mark.parametrize(
    ("words", "status", "code"),
    [
        ((404, NOT_FOUND), 404, None),
        ((429, "Request dropped due to backpressure"), 429, "overloaded"),
        ((503, "Deployment is unavailable"), 503, "unavailable"),
        ((408, "Request timed out"), 408, None),
    ],
)
def test_what_the_proxy_says_itself_is_said_in_the_apis_form(
    proxy: Proxy, client: httpx.Client, words: tuple[int, str], status: int, code: str | None
) -> None:
    proxy.own_words = words
    answer = client.get("/x")
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.headers["x-request-id"] == "abc"
    assert ("retry-after" in answer.headers) == (status in (429, 503))


def test_before_the_first_application_there_is_a_503_and_no_404(proxy: Proxy, client: httpx.Client) -> None:
    proxy.routes, proxy.own_words = {}, (404, NOT_FOUND)
    answer = client.get("/health")
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "nothing is served here yet")


HEAD = b"POST / HTTP/1.1\r\nhost: x\r\n"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (HEAD + b"x-request-id: caf\xe9\r\n\r\n", 400),
        (HEAD + b"x-request-id: " + b"a" * 129 + b"\r\n\r\n", 400),
        (HEAD + b"x-request-id: \r\n\r\n", 400),
        (HEAD + b"serve_multiplexed_model_id: \xff\r\n\r\n", 400),
        (HEAD + b"x-session-id: \xff\r\n\r\n", 400),
        (HEAD + b"x-long: " + b"a" * 40_000 + b"\r\n\r\n", 431),
        (HEAD + b"x-long: " + b"a" * 1_000_000 + b"\r\n\r\n", 431),
        (HEAD + b"x-many: a\r\n" * 101 + b"\r\n", 431),
        (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", 431),
        (b"GET /health\r\n\r\n", 505),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n", 400),
        (b"NONSENSE / HTTP/1.1\r\nhost: x\r\n\r\n", 400),
        (HEAD + b"content-length: -1\r\n\r\n", 400),
        (HEAD + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabcd", 400),
    ],
    ids=lambda value: value[:60] if isinstance(value, bytes) else None,
)
def test_what_is_no_request_is_refused_and_the_connection_ends(
    proxy: Proxy, address: Address, request_: bytes, status: int
) -> None:
    assert status_of(ask(address, request_)) == status
    assert not proxy.seen


def test_nobody_can_make_serve_overlook_that_he_left(proxy: Proxy, client: httpx.Client) -> None:
    client.get("/", headers={"x-request-disconnect-disabled": "?1", "x-other": "1"})
    [(_, _, headers)] = proxy.seen
    assert "x-other" in headers
    assert "x-request-disconnect-disabled" not in headers


def test_a_body_that_does_not_come_is_a_408(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_middleware, "BODY_TIMEOUT_S", 0.3)
    assert status_of(ask(address, HEAD + b"content-length: 9\r\n\r\nhalf")) == 408


def test_headers_that_do_not_come_are_a_408(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "HEAD_TIMEOUT_S", 0.3)
    assert status_of(ask(address, HEAD)) == 408
    assert status_of(ask(address, b"")) == 408


@pytest.mark.parametrize("half", [b"content-length: 9\r\n\r\nhalf", b"x-half: "], ids=["bodies", "headers"])
def test_hundreds_of_half_requests_shut_nobody_out(
    address: Address, client: httpx.Client, monkeypatch: pytest.MonkeyPatch, half: bytes
) -> None:
    """The oldest half request is cut off for a new connection, so complete requests are served."""
    monkeypatch.setattr(http_connection, "MAX_CONNECTIONS", 150)
    with contextlib.ExitStack() as crowd:
        for _ in range(400):
            connection = crowd.enter_context(socket.create_connection(address))
            connection.sendall(HEAD + half)
        for _ in range(5):
            assert client.post("/v1/images/generations", content=b"whole").status_code == 200


def test_an_answer_that_nobody_takes_is_cut_off(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "STALL_TIMEOUT_S", 0.3)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
        connection.connect(address)
        connection.sendall(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n")
        time.sleep(1.0)
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(2**20):
                received += len(piece)
        assert received < 2**25


def test_a_body_that_breaks_off_in_no_chunk_is_a_400_and_is_asked_of_nobody(
    proxy: Proxy, address: Address
) -> None:
    answer = ask(address, HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n{}")
    assert status_of(answer) == 400
    assert proxy.seen == []


def ask_large(stack: contextlib.ExitStack, address: Address, *, buffer_bytes: int = 2**12) -> socket.socket:
    connection = stack.enter_context(socket.socket())
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    connection.settimeout(10.0)
    connection.connect(address)
    connection.sendall(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n")
    return connection


def num_received(connection: socket.socket, *, pause_s: float = 0.0) -> int:
    received = 0
    with contextlib.suppress(ConnectionResetError, TimeoutError):
        while received < 2**25 and (piece := connection.recv(2**21)):
            received += len(piece)
            time.sleep(pause_s)
    return received


def test_an_answer_in_one_piece_that_is_taken_slowly_is_not_cut_off(
    address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client reads for many times STALL_TIMEOUT_S, but never stops reading."""
    monkeypatch.setattr(http_connection, "STALL_TIMEOUT_S", 0.3)
    with contextlib.ExitStack() as stack:
        assert num_received(ask_large(stack, address, buffer_bytes=2**17), pause_s=0.005) >= 2**25


def test_of_too_many_answers_that_nobody_takes_the_one_that_waits_longest_is_cut(
    address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_connection, "MAX_WAITING_ANSWERS", 2)
    with contextlib.ExitStack() as stack:
        first, *others = [(ask_large(stack, address), time.sleep(0.3))[0] for _ in range(3)]
        assert num_received(first) < 2**25
        assert all(num_received(other) >= 2**25 for other in others)


def test_bytes_that_wait_for_clients_are_bounded_in_all(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "MAX_WAITING_BYTES", 2**26)
    with contextlib.ExitStack() as stack:
        first, *others = [(ask_large(stack, address), time.sleep(0.3))[0] for _ in range(3)]
        assert num_received(first) < 2**25
        assert all(num_received(other) >= 2**25 for other in others)


def test_the_proxys_own_429_tells_what_an_ingress_told_last(proxy: Proxy, client: httpx.Client) -> None:
    proxy.own_words = (429, "Request dropped due to backpressure (num_queued_requests=3).")
    assert client.get("/x").headers["Retry-After"] == "5"
    proxy.own_words = None
    assert client.get("/busy").status_code == 429
    proxy.own_words = (429, "Request dropped due to backpressure (num_queued_requests=3).")
    refused = client.get("/x")
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "7")
    assert refused.json()["error"]["code"] == "overloaded"


def test_a_client_that_leaves_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    left = threading.Event()

    async def slow(_: Scope, receive: Receive, __: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        left.set()

    with listening(ProxyMiddleware(slow)) as address:
        with socket.create_connection(address) as connection:
            connection.sendall(HEAD + b"content-length: 4\r\n\r\nbody")
        assert left.wait(10)


def test_serves_proxies_load_it() -> None:
    """Loads the middleware by name from the environment, as Serve does. uvicorn then uses BoundedConnection."""
    from ray.serve._private.http_util import call_function_from_import_path, validate_http_proxy_callback_return

    from serve_app.commands.ray_environment import RAY_ENVIRONMENT

    path = RAY_ENVIRONMENT["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]
    made = validate_http_proxy_callback_return(call_function_from_import_path(path))
    assert [middleware.cls for middleware in made] == [ProxyMiddleware, ExitOnSigterm]
    config = uvicorn.Config(lambda: None, factory=True)
    config.load()
    assert config.http_protocol_class is BoundedConnection

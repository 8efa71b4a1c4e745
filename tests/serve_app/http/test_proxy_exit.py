"""Tests of the proxy's middleware on a server of its own: what SIGTERM does to it and to its requests."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from serve_app.http.proxy_exit import FLUSH_S

ROOT = Path(__file__).parents[3]
PROGRAM = """
import asyncio, sys, threading
import uvicorn
from serve_app.http.proxy_exit import ExitOnSigterm

is_in, may_go = asyncio.Event(), asyncio.Event()

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    if scope["path"] == "/slow":
        is_in.set()
        await may_go.wait()
    elif scope["path"] == "/is_in":
        await is_in.wait()
    elif scope["path"] == "/go":
        may_go.set()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"served"})

app = ExitOnSigterm(app)
server = threading.Thread(target=uvicorn.run, args=(app,), kwargs={"port": int(sys.argv[1]), "lifespan": "off"})
server.start()
server.join()
"""
Proxy = tuple[subprocess.Popen[bytes], str]


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", PROGRAM, str(port)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 30
        while True:
            try:
                httpx.get(url)
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield process, url
        process.kill()


def test_what_is_in_it_and_what_still_comes_is_answered_before_it_ends(proxy: Proxy) -> None:
    process, url = proxy
    with ThreadPoolExecutor(1) as thread, httpx.Client() as client:
        slow = thread.submit(httpx.get, f"{url}/slow", timeout=30)
        client.get(f"{url}/is_in", timeout=30)
        process.send_signal(signal.SIGTERM)
        time.sleep(2 * FLUSH_S)
        assert client.get(f"{url}/go").text == "served"
        assert slow.result().text == "served"
    assert process.wait(timeout=10) == 0


def test_an_idle_one_ends_at_once(proxy: Proxy) -> None:
    process, _ = proxy
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 0

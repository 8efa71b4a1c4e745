"""The proxy's middleware on a server of its own: what SIGTERM does to it and to whom it serves."""

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

ROOT = Path(__file__).parent.parent.parent
TAKES_S = 4.0
PROGRAM = """
import asyncio, sys, threading
import uvicorn
from serve_app.proxy_exit import ExitOnSigterm

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    await asyncio.sleep(float(sys.argv[2]) if scope["path"] == "/slow" else 0)
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
    command = [sys.executable, "-c", PROGRAM, str(port), str(TAKES_S)]
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
        slow = thread.submit(httpx.get, f"{url}/slow")
        time.sleep(TAKES_S / 4)
        process.send_signal(signal.SIGTERM)
        assert client.get(url).text == "served"
        assert slow.result().text == "served"
    assert process.wait(timeout=10) == 0


def test_an_idle_one_ends_at_once(proxy: Proxy) -> None:
    process, _ = proxy
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 0

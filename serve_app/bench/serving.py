"""Serves a config over HTTP, for benchmarks that act as clients."""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import yaml

from serve_app.config.serve_file import read_serve_file

READY_TIMEOUT_S = 300


@contextmanager
def serving(config_file: Path, port: int) -> Iterator[float]:
    """Runs `serve run` with a config on a port; yields the seconds until /health first answered 200."""
    document = read_serve_file(config_file)
    document["http_options"] = {"host": "127.0.0.1", "port": port}
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "serve.yaml", Path(folder) / "log"
        file.write_text(yaml.safe_dump(document))
        command = [str(Path(sys.executable).with_name("serve")), "run", str(file)]
        start = time.perf_counter()
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(f"http://127.0.0.1:{port}/health", process, log)
            yield time.perf_counter() - start
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise TimeoutError(f"{url} did not answer 200 within {READY_TIMEOUT_S} s:\n{log.read_text()[-2000:]}")

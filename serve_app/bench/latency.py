"""How long until the first 200, and what one request costs over the plain pipeline.

Three ways to the same picture, in turn so that a drifting machine is fair to all: the plain pipeline in this
process, the served app over HTTP with a prompt it has not seen, and with one it has.
"""

import base64
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import yaml
from rich.progress import track

from serve_app.bench.report import Row, report
from serve_app.bench.whole import PlainPipeline
from serve_app.config import load_app_config

READY_TIMEOUT_S = 300


def run(config_file: Path, *, port: int, num_requests: int, json_file: Path | None) -> None:
    """Rows of `path`, `ready_s`, `p50_ms`, `p90_ms`, `over_plain_ms` (difference of the medians)."""
    config = load_app_config(config_file)
    plain = PlainPipeline(config)
    url = f"http://127.0.0.1:{port}"
    with serving(config_file, port) as ready_s, httpx.Client(base_url=url, timeout=600) as client:
        ways: dict[str, Callable[[int], object]] = {
            "plain pipeline": lambda i: plain.draw(prompt=f"prompt {i}", seed=i),
            "relay, new prompt": lambda i: _post(client, f"prompt {i}", seed=i),
            "relay, known prompt": lambda i: _post(client, "prompt", seed=i),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for i in track(range(-2, num_requests), description="requests"):
            for way, draw in ways.items():
                start = time.perf_counter()
                draw(1000 + i)
                if i >= 0:
                    times[way].append((time.perf_counter() - start) * 1e3)
    baseline = statistics.median(times["plain pipeline"])
    rows: list[Row] = [
        {
            "path": way,
            "ready_s": "-" if way == "plain pipeline" else ready_s,
            "p50_ms": statistics.median(ms),
            "p90_ms": statistics.quantiles(ms, n=10)[-1],
            "over_plain_ms": statistics.median(ms) - baseline,
        }
        for way, ms in times.items()
    ]
    report(f"latency of one request, {config.served[0].model.checkpoint}", rows, json_file)


@contextmanager
def serving(config_file: Path, port: int) -> Iterator[float]:
    """`serve run` of a config on a port; yields the seconds until /health first said 200."""
    document = yaml.safe_load(config_file.read_text())
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


def _post(client: httpx.Client, prompt: str, *, seed: int) -> None:
    answer = client.post("/v1/images/generations", json={"prompt": prompt, "seed": seed})
    answer.raise_for_status()
    base64.b64decode(answer.json()["data"][0]["b64_json"])

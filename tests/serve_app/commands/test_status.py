"""Tests of how `relay status` shows the answer of GET /v1/status, without an app."""

import io
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from serve_app.commands.status import COLUMNS, NoStatus, fetch_status, is_loopback, render_status, status_table

MEMORY = {
    "weights_bytes": {"cuda float16": 2**31, "cpu float32": 2**29},
    "peak_reserved_bytes": 3 * 2**30,
    "limit_bytes": None,
}
QUEUE = {"num_seats": 6, "num_waiting": 4}
RANKS = [
    {"rank": 0, "blocks": {"transformer": [0, 19]}, "num_micro_batches": 50, "compute_s": 9.0, "memory": MEMORY},
    {"rank": 1, "blocks": {"transformer": [19, 57]}, "num_micro_batches": 48, "compute_s": 6.0, "memory": MEMORY},
]
STATUS: dict[str, Any] = {
    "model": "flux",
    "num_in_progress": 7,
    "age_s": 0.4,
    "encoder": {"state": "HEALTHY", "message": "", "num_replicas": {}, "replicas": []},
    "transformer": {
        "state": "UPSCALING",
        "message": "waiting for GPUs",
        "num_replicas": {"RUNNING": 1, "STARTING": 2},
        "replicas": [{"queue": QUEUE, "occupied_s": 10.0, "ranks": RANKS}],
    },
    "vae": {
        "state": "HEALTHY",
        "message": "",
        "num_replicas": {"RUNNING": 1},
        "replicas": [{"num_in_flight": 1, "num_decoded": 40, "memory": MEMORY}],
    },
}


def rows(status: dict[str, Any]) -> list[list[str]]:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(status_table(status))
    lines = console.export_text().splitlines()
    header, *found = [[cell.strip() for cell in line.split("│")] for line in lines if "│" in line]
    assert header == list(COLUMNS)
    return found


def test_every_rank_has_a_row_and_the_first_tells_the_queue() -> None:
    first, second = rows(STATUS)[1:3]
    assert first == [
        *("transformer", "1, 2 starting, UPSCALING", "6", "4"),
        *("50 batches, blocks 0-18, bubble 10%", "2.50 GiB", "3.00 GiB"),
    ]
    assert second == ["", "", "", "", "48 batches, blocks 19-56, bubble 40%", "2.50 GiB", "3.00 GiB"]


def test_80_columns_break_no_word() -> None:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(status_table(STATUS))
    text = console.export_text()
    words = {word for line in text.splitlines() for cell in line.split("│") for word in cell.split()}
    assert "…" not in text
    assert {"transformer", "UPSCALING", "starting,", "batches,", "replicas", "waiting", "2.50", "GiB"} <= words


def test_a_stage_without_replicas_is_asleep() -> None:
    assert rows(STATUS)[0] == ["encoder", "asleep", "", "", "", "", ""]


def test_what_serve_says_of_a_stage_is_told() -> None:
    assert any("waiting for GPUs" in row for row in rows(STATUS))


def test_what_is_old_tells_its_age() -> None:
    assert status_table(STATUS).title == "flux: 7 requests in progress"
    assert str(status_table(STATUS | {"age_s": 8.2}).title).endswith("; the stages reported 8 s ago")


def test_every_model_has_a_table_and_a_shared_stage_its_rows_in_one() -> None:
    other = STATUS | {"model": "kontext", "vae": STATUS["vae"] | {"deployment": "Vae_kontext"}}
    status = {"num_in_progress": 14, "age_s": 0.4, "models": {"flux": STATUS, "kontext": other}}
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(render_status(status))
    text = console.export_text()
    assert [line.split(":")[0] for line in text.splitlines() if "requests" in line and ":" in line] == [
        "flux",
        "kontext",
    ]
    assert (text.count("shared with flux"), text.count("40 decoded"), text.count("blocks 0-18")) == (2, 2, 1)


def test_a_server_that_is_away_is_one_line() -> None:
    with pytest.raises(NoStatus, match=r"http://127\.0\.0\.1:9 does not answer"):
        fetch_status("127.0.0.1:9")


class Server(BaseHTTPRequestHandler):
    """Answers GET /v1/status with STATUS, with one more request in progress each time."""

    num_asked = 0

    def do_GET(self) -> None:
        type(self).num_asked += 1
        body = json.dumps(STATUS | {"num_in_progress": self.num_asked}).encode()
        self.send_response(200 if self.path == "/v1/status" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Logs nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_error_of_the_server_is_told(url: str) -> None:
    with pytest.raises(NoStatus, match="answers 404"):
        fetch_status(f"{url}/elsewhere")


@pytest.mark.parametrize("cut", ["http://", ""])
def test_this_machine_is_asked_directly_with_or_without_a_scheme(
    url: str, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy that the environment names is used for other machines only."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetch_status(url.removeprefix(cut))["model"] == "flux"


@pytest.mark.parametrize(
    ("url", "is_own"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://127.8.0.1", True),
        ("http://[::1]:8000", True),
        ("http://localhost:8000", True),
        ("http://10.0.0.1:8000", False),
        ("http://relay.example", False),
    ],
)
def test_a_proxy_is_asked_for_other_machines_only(url: str, is_own: bool) -> None:
    assert is_loopback(url) == is_own


def test_watching_asks_again_and_again_until_it_is_interrupted(url: str) -> None:
    relay = str(Path(sys.executable).with_name("relay"))
    command = [relay, "status", "--watch", "--url", url]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    asked_before = Server.num_asked
    while Server.num_asked < asked_before + 3:
        assert watching.poll() is None, watching.communicate()
        threading.Event().wait(0.05)
    watching.send_signal(signal.SIGINT)
    shown, errors = watching.communicate(timeout=30)
    assert (watching.returncode, errors) == (0, "")
    assert "flux: " in shown

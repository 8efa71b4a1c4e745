"""An image server of another kind: it knows only OpenAI's fields, takes a fixed time for each image, and refuses
requests if told to."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PICTURE = "iVBORw0KGgo="


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    """The default of 5 drops a connection of a burst while the machine is busy; its client then waits
    indefinitely."""


@dataclass
class ForeignServer:
    """The server's settings, and the requests that it has received."""

    url: str = ""
    service_s: float = 0.05
    num_to_refuse: int = 0
    num_to_hold: int = 0
    """No request is answered before this many have arrived."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    _at_once: int = 0
    _lock: Any = field(default_factory=threading.Lock)

    def answer(self, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        with self._lock:
            self.bodies.append(body)
            self.headers.append(headers)
            is_refused = self.num_to_refuse > 0
            self.num_to_refuse -= is_refused
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        while len(self.bodies) < self.num_to_hold:
            time.sleep(0.01)
        if not is_refused:
            time.sleep(self.service_s)
        with self._lock:
            self._at_once -= 1
        if is_refused:
            return 429, {"error": {"message": "too many", "type": "rate_limit", "param": None, "code": None}}
        return 200, {"created": 1, "data": [{"b64_json": PICTURE}] * body.get("n", 1)}


@contextmanager
def foreign_server(**settings: Any) -> Iterator[ForeignServer]:
    server = ForeignServer(**settings)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/v1/videos":
                server.bodies.append(body)
                self._send(200, {"id": "video_1", "status": "queued"})
            else:
                self._send(*server.answer(body, {key.lower(): value for key, value in self.headers.items()}))

        def do_GET(self) -> None:
            documents: dict[str, Any] = {
                "/v1/models": {"data": [{"id": "foreign"}]},
                "/v1/videos/video_1": {"id": "video_1", "status": "completed"},
                "/v1/videos/video_1/content": "mp4",
            }
            self._send(200, documents[self.path])

        def _send(self, status: int, document: Any) -> None:
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if status == 429:
                self.send_header("Retry-After", "0.2")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    http = _Server(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()

"""A connection of Serve's HTTP proxy: uvicorn's own, with the bounds that it lacks.

Who is not done with the head of a request, or takes none of an answer's bytes, is cut off after a while; where
there are too many connections, the one that has asked for nothing longest makes room.
"""

import asyncio
import json
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serve_app.errors import BadCall

HEAD_TIMEOUT_S = 20.0
"""From the first byte of a request (of a new connection: from its start) to the end of its headers."""
MAX_HEAD_BYTES = 64 * 1024
"""Request line and headers. proxy_middleware.py refuses less, with a better answer."""
STALL_TIMEOUT_S = 30.0
"""In which a client must take about 50 kB of an answer that waits for it."""
MAX_CONNECTIONS = 2048


class BoundedConnection(HttpToolsProtocol):
    """Between requests, or before the first, it is idle."""

    _idle: ClassVar[dict["BoundedConnection", None]] = {}
    """Of this process, in the order in which they became so."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head, self._num_head_bytes = True, 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._idle[self] = None
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._on_late_head)
        if len(self.connections) > MAX_CONNECTIONS and self._idle:
            next(iter(self._idle))._cut()

    def connection_lost(self, exc: Exception | None) -> None:
        self._idle.pop(self, None)
        self._stop_head_timer()
        self._stop_stall_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_head:
            self._num_head_bytes += len(data)
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._on_late_head)
        super().data_received(data)
        if self._in_head and self._num_head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, f"the headers are too long; the limit is {MAX_HEAD_BYTES} bytes")

    def on_headers_complete(self) -> None:
        self._in_head, self._num_head_bytes = False, 0
        self._stop_head_timer()
        self._idle.pop(self, None)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and not self.pipeline:
            self._idle[self] = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(STALL_TIMEOUT_S, self._cut)

    def resume_writing(self) -> None:
        self._stop_stall_timer()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():  # closing would wait until the client takes it
            self._cut()
        else:
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "not HTTP/1.1: " + msg)

    def _on_late_head(self) -> None:
        self._head_timer = None
        self._refuse(408, f"the headers were not complete within {HEAD_TIMEOUT_S:g} s")

    def _refuse(self, status: int, message: str) -> None:
        """The answer to what never became a request; ends the connection."""
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:  # an answer is under way: not into it
            self._cut()
            return
        body = json.dumps(BadCall(message).body()).encode()
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[status] + head.encode() + body)
        self.transport.close()

    def _cut(self) -> None:
        self.transport.abort()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

"""A connection of Serve's HTTP proxy: uvicorn's own, with the limits that it lacks.

A client that does not finish the head of a request, or reads too little of an answer, is disconnected after a
while. If there are too many connections, the one that has been idle longest is closed; if too many answers wait
for their clients, the one that has waited longest.
"""

import asyncio
import json
import struct
from fcntl import ioctl
from termios import TIOCOUTQ
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serve_app.errors import BadCall

HEAD_TIMEOUT_S = 20.0
"""From the first byte of a request (for a new connection: from its start) to the end of its headers."""
MAX_HEAD_BYTES = 64 * 1024
"""Limit for request line and headers. proxy_middleware.py has a lower limit with a better answer."""
STALL_TIMEOUT_S = 30.0
MIN_BYTES_PER_S = 4096
"""What a client must read of a waiting answer, on average over each STALL_TIMEOUT_S."""
MAX_WAITING_ANSWERS = 256
"""Each of these answers is in this process's memory."""
MAX_WAITING_BYTES = 2**29
"""Limit for all waiting answers together, as far as they were written to their connections."""
MAX_CONNECTIONS = 2048


class BoundedConnection(HttpToolsProtocol):
    """A connection with limits. It is idle before its first request and between requests."""

    _idle: ClassVar[dict["BoundedConnection", None]] = {}
    """Idle connections of this process, the longest idle first."""
    _waiting: ClassVar[dict["BoundedConnection", None]] = {}
    """Connections whose answers wait for their clients, the longest waiting first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head, self._num_head_bytes = True, 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._num_untaken = 0

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
        self._waiting[self] = None
        self._watch()
        num_bytes = sum(each.transport.get_write_buffer_size() for each in self._waiting)
        if len(self._waiting) > MAX_WAITING_ANSWERS or num_bytes > MAX_WAITING_BYTES:
            next(iter(self._waiting))._cut()

    def resume_writing(self) -> None:
        self._stop_stall_timer()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():  # closing would wait until the client has read the answer
            self._cut()
        else:
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "not HTTP/1.1: " + msg)

    def _on_late_head(self) -> None:
        self._head_timer = None
        self._refuse(408, f"the headers were not complete within {HEAD_TIMEOUT_S:g} s")

    def _refuse(self, status: int, message: str) -> None:
        """Sends an error for input that never became a request, and closes the connection."""
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.response_started:  # an answer has started, so no error can be sent
                self._cut()
                return
            self.cycle.disconnected = True  # the application's answer to the incomplete body is dropped
            self.cycle.message_event.set()
        body = json.dumps(BadCall(message).body()).encode()
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[status] + head.encode() + body)
        self.transport.close()

    def _watch(self) -> None:
        self._num_untaken = self._count_untaken()
        self._stall_timer = self.loop.call_later(STALL_TIMEOUT_S, self._on_stall)

    def _count_untaken(self) -> int:
        """Returns the unread bytes, including the kernel's buffer, which is refilled only when it is largely
        empty."""
        in_kernel = struct.unpack("i", ioctl(self.transport.get_extra_info("socket"), TIOCOUTQ, b"\0" * 4))[0]
        return self.transport.get_write_buffer_size() + int(in_kernel)

    def _on_stall(self) -> None:
        """Cuts the connection if the client has read too little: a long answer may be one piece and so wait for
        minutes."""
        num_taken = self._num_untaken - self._count_untaken()
        if num_taken < STALL_TIMEOUT_S * MIN_BYTES_PER_S:
            self._cut()
        else:
            self._watch()

    def _cut(self) -> None:
        self._waiting.pop(self, None)
        self.transport.abort()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_stall_timer(self) -> None:
        self._waiting.pop(self, None)
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

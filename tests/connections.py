"""Clients that send arbitrary bytes and disconnect at any time."""

import json
import socket
from typing import Any

from tests.app import PATIENCE_S, App

PATH = "/v1/images/generations"


def connect(app: App, *, buffer_bytes: int | None = None) -> socket.socket:
    connection = socket.socket()
    if buffer_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    connection.settimeout(PATIENCE_S)
    host, port = app.client.base_url.host, app.client.base_url.port
    assert port is not None
    connection.connect((host, port))
    return connection


def head(app: App, num_bytes: int) -> bytes:
    lines = (
        f"POST /{app.name}{PATH} HTTP/1.1",
        "host: relay",
        "content-type: application/json",
        f"content-length: {num_bytes}",
    )
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def ask(app: App, connection: socket.socket, **fields: Any) -> None:
    body = json.dumps({"prompt": "a cat"} | fields).encode()
    connection.sendall(head(app, len(body)) + body)

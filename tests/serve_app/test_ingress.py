"""Test of an ingress replica that has just started."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from serve_app.bench.processes import find_processes

pytestmark = pytest.mark.slow


def test_a_new_one_serves_its_first_request_while_serves_controller_is_silent(
    start_ingress: Callable[..., Any],
) -> None:
    client = start_ingress("untried").client
    assert client.get("/v1/models").status_code == 200  # now the proxy knows the replica; no stage has been called
    [controller] = find_processes()["Serve controller"]
    os.kill(controller, signal.SIGSTOP)
    try:
        answer = client.post("/v1/images/generations", json={"prompt": "a red circle"}, timeout=30)
    finally:
        os.kill(controller, signal.SIGCONT)
    assert answer.status_code == 200, answer.text

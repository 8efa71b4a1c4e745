"""Tests of the check that a port can be listened on, which runs before anything starts."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from serve_app.commands.port import find_port_fault, url_of


@pytest.fixture
def shared() -> Iterator[int]:
    """A port that is in use with SO_REUSEPORT, as Serve's proxies use theirs."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_port_that_another_would_share_is_taken_and_its_holder_named(shared: int, host: str) -> None:
    fault = find_port_fault(host, shared)
    assert fault is not None
    assert fault.startswith(f"port {shared} of {host} is taken by ")
    assert f"(pid {os.getpid()}): stop that process, or choose another with --port" in fault


def test_the_holder_is_named_while_it_opens_and_closes_files() -> None:
    is_over = threading.Event()

    def open_and_close() -> None:
        while not is_over.is_set():
            open_many().close()

    with contextlib.ExitStack() as stack:
        with open_many():
            holder = stack.enter_context(socket.create_server(("127.0.0.1", 0)))  # its descriptor is a high one
        port = holder.getsockname()[1]
        busy = threading.Thread(target=open_and_close)
        busy.start()
        faults = {find_port_fault("127.0.0.1", port) for _ in range(50)}
        is_over.set()
        busy.join()
    assert len(faults) == 1
    assert f"(pid {os.getpid()})" in str(faults)


def open_many() -> contextlib.ExitStack:
    files = contextlib.ExitStack()
    for _ in range(50):
        files.enter_context(socket.socket())
    return files


def test_a_port_that_was_let_go_a_moment_ago_is_free(shared: int) -> None:
    with socket.create_connection(("127.0.0.1", shared)):
        pass
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert find_port_fault("127.0.0.1", port) is None


@pytest.mark.parametrize(
    ("host", "told"),
    [
        ("192.0.2.1", "host 192.0.2.1 is not an address of this machine"),
        ("no such host", "host 'no such host' is not an address of this machine"),
        ("no..host", "host 'no..host' is not an address of this machine"),
        ("a" * 300, f"host '{'a' * 300}' is not an address of this machine"),
    ],
)
def test_a_host_of_another_machine_is_refused(host: str, told: str) -> None:
    fault = find_port_fault(host, 8000)
    assert fault is not None
    assert fault.startswith(told)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("gpu-1", "http://gpu-1:80"),
    ],
)
def test_the_address_is_one_that_a_browser_can_open(host: str, url: str) -> None:
    assert url_of(host, 80) == url

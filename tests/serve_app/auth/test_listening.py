"""Tests that an app without keys may listen on loopback only, however Serve was started."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from serve_app.auth.config import LOCAL_ACCESS, Access, AuthConfig, CorsConfig
from serve_app.auth.listening import find_listening_fault, is_loopback

ROOT = Path(__file__).parent.parent.parent.parent
KEYED = Access(auth=AuthConfig())
OPEN = Access(is_open=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "127.1", "localhost", "::1", "::ffff:127.0.0.1"])
def test_these_are_this_machine_alone(host: str) -> None:
    assert is_loopback(host)
    assert find_listening_fault(host, [LOCAL_ACCESS]) is None


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "0", "", "::", "::ffff:0.0.0.0", "10.0.0.1", "192.0.2.7", "no.such.host.invalid", "a" * 300],
)
def test_these_are_not(host: str) -> None:
    assert not is_loopback(host)
    fault = find_listening_fault(host, [LOCAL_ACCESS])
    assert fault is not None
    assert fault.startswith(
        f"http_options.host {host}: other machines would reach this server, and it requires no key"
    )
    assert find_listening_fault(host, [KEYED]) is None
    assert find_listening_fault(host, [OPEN]) is None


def test_one_application_without_keys_is_enough_to_refuse() -> None:
    assert find_listening_fault("0.0.0.0", [KEYED, LOCAL_ACCESS]) is not None
    assert find_listening_fault("0.0.0.0", [KEYED, OPEN]) is None


def test_where_there_is_no_http_nobody_is_refused() -> None:
    assert find_listening_fault(None, [LOCAL_ACCESS]) is None


@pytest.mark.parametrize(
    "origin", ["shop.example", "https://shop.example/", "https://", "ftp://x", "", "https://x y"]
)
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValidationError, match=r"an origin must be SCHEME://HOST or SCHEME://HOST:PORT"):
        CorsConfig(origins=(origin,))


@pytest.mark.parametrize("origin", ["*", "http://localhost:3000", "https://shop.example", "http://[::1]:8080"])
def test_an_origin_is_taken(origin: str) -> None:
    assert CorsConfig(origins=(origin,)).origins == (origin,)


def test_the_usage_lies_beside_the_keys_by_the_applications_name() -> None:
    auth = AuthConfig(keys_file="/etc/relay/keys.yaml")
    assert auth.usage_path("shop") == Path("/etc/relay/keys.shop.usage.json")
    assert AuthConfig(keys_file="/a", usage_file="/b").usage_path("shop") == Path("/b")


@pytest.mark.slow
@pytest.mark.thorough
def test_an_app_asks_serve_itself_where_it_listens() -> None:
    """With `serve run`, `serve deploy` and Python, the app's config does not contain Serve's host.

    Runs in a Ray of its own, whose Serve listens on all interfaces.
    """
    program = """if True:
        import logging, socket, sys
        import ray
        from ray import serve
        from serve_app.app import build_app
        from serve_app.auth.config import Access
        from serve_app.auth.proxies import check_listening

        args = {"model": {"name": "m", "checkpoint": "embedded://shapes"}}
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        build_app(args)  # nothing is known of a Serve that does not run
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        serve.start(http_options={"host": "0.0.0.0", "port": port})
        try:
            build_app(args)
        except Exception as error:
            print(error)
        build_app(args | {"open": True})
        try:
            check_listening(Access())
        except ValueError as error:
            print(error)
        serve.shutdown()
        ray.shutdown()
    """
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    told = "http_options.host 0.0.0.0: other machines would reach this server"
    lines = [line for line in run.stdout.splitlines() if told in line]
    assert [line.partition(told)[0] for line in lines] == ["ConfigError: ", ""], run.stdout + run.stderr

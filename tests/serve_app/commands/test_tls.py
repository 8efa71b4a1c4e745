"""Tests of the check that HTTPS can be served, which runs before anything starts."""

import subprocess
from pathlib import Path

import pytest
from ray.serve.schema import HTTPOptionsSchema

from serve_app.commands.port import url_of
from serve_app.commands.tls import find_tls_fault


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    """Paths of a self-signed certificate and of its key."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=gpu-1"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return str(certificate), str(key)


def fault(certificate: str | None, key: str | None, **options: str) -> str | None:
    options_of_ray = HTTPOptionsSchema.model_construct(ssl_certfile=certificate, ssl_keyfile=key, **options)
    return find_tls_fault(options_of_ray)


def test_a_certificate_and_its_key_are_good(pair: tuple[str, str]) -> None:
    certificate, key = pair
    assert fault(certificate, key, ssl_ca_certs=certificate) is None


def test_without_both_it_is_http() -> None:
    assert fault(None, None) is None


@pytest.mark.parametrize("has_key", [False, True])
def test_one_without_the_other_is_refused(pair: tuple[str, str], has_key: bool) -> None:
    certificate, key = pair
    told = fault(None, key) if has_key else fault(certificate, None)
    assert told is not None
    assert told.startswith("http_options: HTTPS needs both ssl_certfile and ssl_keyfile")


def test_files_that_are_not_there_or_no_pair_are_refused(pair: tuple[str, str]) -> None:
    certificate, key = pair
    wrong = [("/no/such", key), (certificate, "/no/such"), (key, certificate), (certificate, __file__)]
    told = [fault(*files) for files in wrong] + [fault(*pair, ssl_ca_certs="/no/such")]
    assert all(each is not None and "HTTPS cannot be served with" in each for each in told)


def test_its_address_says_so() -> None:
    assert url_of("0.0.0.0", 8000, "https") == "https://127.0.0.1:8000"

"""Tests of `relay key`."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve_app.auth.keys import KeyFault, KeyRing, read_keys
from serve_app.cli import cli
from serve_app.commands.key import create

Relay = Callable[..., str]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "new" / "keys.yaml"


@pytest.fixture
def relay(file: Path) -> Relay:
    """Runs a subcommand and returns its standard output, or raises its error."""

    def run(*args: str) -> str:
        result = CliRunner().invoke(cli, ["key", *args, "--file", str(file)], env={"COLUMNS": "200"})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.stdout

    return run


def test_a_key_is_printed_once_and_opens(relay: Relay, file: Path) -> None:
    secret = relay("create", "shop").strip()
    assert re.fullmatch(r"relay-[\w-]{43}", secret)
    found = KeyRing(read_keys(file)).find(secret.encode())
    assert found is not None
    assert found.name == "shop"
    assert secret not in relay("list")
    assert secret not in file.read_text()


def test_limits_are_listed(relay: Relay) -> None:
    relay("create", "shop", "--requests-per-minute", "60", "--budget", "3000", "--per", "month")
    relay("create", "me", "--max-concurrent-requests", "2", "--max-cost", "50")
    shop, me = relay("list").splitlines()[1:]
    assert shop.split()[2:] == ["60", "any", "any", "3000", "megapixel-steps", "a", "month"]
    assert me.split()[2:] == ["any", "2", "50", "megapixel-steps", "any"]


def test_a_key_that_is_revoked_is_gone(relay: Relay, file: Path) -> None:
    relay("create", "shop")
    relay("create", "me")
    relay("revoke", "shop")
    assert [key.name for key in read_keys(file)] == ["me"]
    relay("revoke", "me")
    assert read_keys(file) == ()


def test_a_name_is_given_once(relay: Relay) -> None:
    relay("create", "shop")
    with pytest.raises(KeyFault, match="already has a key 'shop': revoke it, or give the new one another name"):
        relay("create", "shop")


def test_a_name_that_nobody_has_is_told_with_those_there_are(relay: Relay) -> None:
    relay("create", "shop")
    with pytest.raises(KeyFault, match="has no key 'shap'; it has: shop"):
        relay("revoke", "shap")


@pytest.mark.parametrize(
    "args", [("",), ("a b",), ("a\nb",), ("x" * 65,), ("x", "--requests-per-minute", "0"), ("x", "--budget", "-1")]
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    relay: Relay, file: Path, args: tuple[str, ...]
) -> None:
    with pytest.raises(KeyFault):
        relay("create", *args)
    assert not file.exists()


def test_commands_at_once_forget_nothing(file: Path) -> None:
    with ThreadPoolExecutor(4) as hands:
        list(hands.map(lambda i: create(f"key-{i}", file), range(12)))
    assert {key.name for key in read_keys(file)} == {f"key-{i}" for i in range(12)}

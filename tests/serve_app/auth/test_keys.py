"""Tests of API keys and of the key file, which holds only hashes and is read again when it changes."""

import hashlib
import hmac
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from serve_app.auth.key_file import KeyFile
from serve_app.auth.keys import ApiKey, KeyFault, KeyLimits, KeyRing, new_key, read_keys, write_keys

NO_LIMITS = KeyLimits()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def write_one(file: Path, name: str, limits: KeyLimits = NO_LIMITS) -> str:
    secret, key = new_key(name, limits)
    write_keys(file, [key])
    return secret


def test_of_a_key_only_the_hash_is_kept(file: Path) -> None:
    secret = write_one(file, "shop")
    text = file.read_text()
    assert hashlib.sha256(secret.encode()).hexdigest() in text
    assert secret not in text
    assert secret.removeprefix("relay-") not in text


def test_a_key_has_256_random_bits() -> None:
    secrets = {new_key("shop", NO_LIMITS)[0] for _ in range(100)}
    assert len(secrets) == 100
    assert {len(each) for each in secrets} == {len("relay-") + 43}  # 43 digits of 6 bits


def test_a_key_is_found_and_another_is_not(file: Path) -> None:
    secret = write_one(file, "shop")
    ring = KeyRing(read_keys(file))
    found = ring.find(secret.encode())
    assert found is not None
    assert found.name == "shop"
    for wrong in (secret[:-1], secret + "x", secret.swapcase(), "", found.sha256, "\xff"):
        assert ring.find(wrong.encode()) is None


@pytest.mark.parametrize("secret", ["first", "last", "wrong"])
def test_any_key_is_compared_with_all_in_constant_time(monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    """The number of comparisons and the length of the digests do not depend on the secret that was sent."""
    made = [new_key(f"key-{i}", NO_LIMITS) for i in range(5)]
    sent = {"first": made[0][0], "last": made[-1][0], "wrong": "x" * 4000}[secret]
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def noting(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return compare(a, b)

    ring = KeyRing([key for _, key in made])
    monkeypatch.setattr(hmac, "compare_digest", noting)
    ring.find(sent.encode())
    assert compared == [(32, 32)] * 5


def test_what_is_written_is_read_again(file: Path) -> None:
    limits = KeyLimits(requests_per_minute=60, budget_megapixel_steps=1.5, budget_period="month")
    keys = [new_key("shop", limits)[1], new_key("me@home", NO_LIMITS)[1]]
    write_keys(file, keys)
    assert list(read_keys(file)) == keys


def test_a_new_file_is_its_owners_alone_and_keeps_what_mode_it_is_given(file: Path) -> None:
    write_one(file, "shop")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o640)
    write_one(file, "shop")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


KEY = "{name: a, sha256: '%s', created: 2026-11-30}" % ("0" * 64)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (f"keys: [{KEY.replace('a,', 'a b,')}]", "keys.0.name: "),
        (
            "keys: [{name: a, sha256: relay-secret, created: 2026-11-30}]",
            "keys.0.sha256: a hash has 64 digits of 0-9 and a-f",
        ),
        ("keys: [{name: a, created: 2026-11-30}]", "keys.0.sha256: Field required"),
        (f"keys: [{KEY.replace('name', 'limit: {}, name')}]", "unknown key 'limit' (did you mean 'limits'"),
        (f"keys: [{KEY.replace('name', 'limits: {requests_per_minute: 0}, name')}]", "equal to 1, got 0"),
        (f"keys: [{KEY.replace('2026-11-30', 'x')}]", "keys.0.created: "),
        (f"keys: [{KEY}, {KEY.replace('00', '11')}]", "two keys have the same name, one of them 'a'"),
        (f"keys: [{KEY}, {KEY.replace('a,', 'b,')}]", "two keys have the same sha256, one of them 'b'"),
        (f"keys: [{KEY.replace('a,', 'relay-secret/,')}]", "keys.0.name: "),
        ("keys: relay-secret", "keys: Input should be a valid tuple"),
        ("relay-secret: {}", "unknown key"),
        ("- relay-secret", "config: Input should be a valid dictionary"),
        ("relay-secret: [", "cannot be read: it is not valid YAML"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_without_a_key_in_the_error(
    file: Path, content: str, told: str
) -> None:
    file.write_text(content)
    with pytest.raises(KeyFault) as refused:
        read_keys(file)
    assert told in str(refused.value)
    assert "relay-secret" not in str(refused.value)


def test_a_file_that_is_not_there_is_refused_with_what_makes_it(file: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"`relay key create NAME --file {file}` makes it"):
        KeyFile(file)


def settle(followed: KeyFile) -> None:
    """Refreshes twice: a changed file is read only once two successive looks see it the same."""
    followed.refresh()
    followed.refresh()


def test_a_key_that_is_revoked_opens_nothing_and_a_new_one_does(file: Path) -> None:
    old = write_one(file, "shop")
    followed = KeyFile(file)
    assert followed.keys.find(old.encode()) is not None
    new = write_one(file, "shop")
    settle(followed)
    assert followed.keys.find(old.encode()) is None
    assert followed.keys.find(new.encode()) is not None


def test_without_its_file_no_key_opens_any_more(file: Path) -> None:
    secret = write_one(file, "shop")
    followed = KeyFile(file)
    file.unlink()
    settle(followed)
    assert followed.keys.find(secret.encode()) is None


def test_of_a_file_that_is_half_written_nothing_is_taken_over(file: Path) -> None:
    secret = write_one(file, "shop")
    whole, followed = file.read_text(), KeyFile(file)
    file.write_text(whole[: whole.index("sha256") + 20])
    settle(followed)
    assert followed.keys.find(secret.encode()) is not None
    file.write_text("keys: []\n")
    settle(followed)
    assert followed.keys.find(secret.encode()) is None


def test_a_file_that_is_still_written_is_not_read(file: Path) -> None:
    """Editors and `cp` empty a file before they write it, and an empty file has no keys."""
    secret = write_one(file, "shop")
    followed = KeyFile(file)
    for num in range(1, 4):
        file.write_text("#" * num)
        followed.refresh()
        assert followed.keys.find(secret.encode()) is not None
    followed.refresh()
    assert followed.keys.find(secret.encode()) is None


def test_a_file_that_a_link_points_to_is_followed_as_kubernetes_mounts_secrets(tmp_path: Path) -> None:
    for version in ("one", "two"):
        (tmp_path / version).mkdir()
    old, new = write_one(tmp_path / "one" / "keys.yaml", "shop"), write_one(tmp_path / "two" / "keys.yaml", "shop")
    (tmp_path / "data").symlink_to("one")
    (tmp_path / "keys.yaml").symlink_to("data/keys.yaml")
    followed = KeyFile(tmp_path / "keys.yaml")
    (tmp_path / "next").symlink_to("two")
    os.replace(tmp_path / "next", tmp_path / "data")
    settle(followed)
    assert followed.keys.find(old.encode()) is None
    assert followed.keys.find(new.encode()) is not None


def test_a_link_to_the_file_stays_a_link(tmp_path: Path) -> None:
    link, file = tmp_path / "keys.yaml", tmp_path / "real.yaml"
    write_one(file, "shop")
    link.symlink_to(file)
    write_one(link, "other")
    assert link.is_symlink()
    assert [key.name for key in read_keys(file)] == ["other"]


def test_a_file_that_is_not_another_is_not_read_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_one(file, "shop")
    followed = KeyFile(file)
    kept = followed.keys
    settle(followed)
    assert followed.keys is kept


def test_a_key_without_limits_is_a_few_lines_of_the_file(file: Path) -> None:
    write_one(file, "shop")
    entry = {line.strip().partition(":")[0] for line in file.read_text().splitlines() if not line.startswith("#")}
    assert entry == {"keys", "- name", "sha256", "created"}


def test_limits_are_fields_with_a_meaning() -> None:
    fields: dict[str, Any] = KeyLimits.model_fields
    assert all(field.description for field in (*fields.values(), ApiKey.model_fields["name"]))

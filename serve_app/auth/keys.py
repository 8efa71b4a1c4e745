"""API keys as they are stored: their SHA-256 hashes, in one YAML file.

A key is 256 random bits, too many to try, so a fast hash is enough. A slow hash, as for passwords, makes up for
how few passwords people choose; here it would only cost each request a tenth of a second.
"""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Collection, Sequence
from datetime import date
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, field_validator

from cluster.config import Config, find_mistakes

Period = Literal["hour", "day", "week", "month"]
PREFIX = "relay-"
"""Prefix of every key, by which people and secret scanners recognize a leaked one."""
_SECRET = re.compile(PREFIX + r"[\w-]+")
"""Matches a key, to remove it from errors: they quote what they found, which may be a key in the wrong place."""
_NUM_BYTES = 32
_HEX_DIGITS = 64
HEAD = """\
# Hashes of Latent Relay's keys, written by `relay key`. You may change the limits here: a running server reads
# the file again when it changes. docs/keys.md explains the limits.
"""


class KeyFault(ValueError):
    """The key file cannot be read or used; the message says why."""


class KeyLimits(Config):
    """The limits of one key. Whatever is left out has no limit."""

    requests_per_minute: int | None = Field(None, ge=1, description="requests in any 60 s")
    max_concurrent_requests: int | None = Field(None, ge=1, description="requests in progress at once")
    max_megapixel_steps: float | None = Field(
        None, gt=0, description="cost of one request: width x height x frames x steps x n / 10⁶"
    )
    budget_megapixel_steps: float | None = Field(
        None, gt=0, description="cost of all requests in one `budget_period`, computed like `max_megapixel_steps`"
    )
    budget_period: Period = Field("day", description="calendar hour, day, week or month, in UTC")

    @property
    def has_any(self) -> bool:
        counted = (self.requests_per_minute, self.max_concurrent_requests, self.budget_megapixel_steps)
        return any(limit is not None for limit in counted)


class ApiKey(Config):
    """One key in the key file: its owner's name, its hash and its limits."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$", description="name of the key in logs and metrics"
    )
    sha256: str
    created: date
    limits: KeyLimits = KeyLimits()

    @field_validator("sha256")
    @classmethod
    def _check_hash(cls, value: str) -> str:
        """Raises ValueError. The message leaves out the value: somebody may have put a key there."""
        if len(value) != _HEX_DIGITS or not all(digit in "0123456789abcdef" for digit in value):
            raise ValueError(f"a hash has {_HEX_DIGITS} digits of 0-9 and a-f; `relay key create` writes one")
        return value


class KeyList(Config):
    """The content of the key file."""

    keys: tuple[ApiKey, ...] = ()

    @field_validator("keys")
    @classmethod
    def _check_unique(cls, keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        for what in ("name", "sha256"):
            seen = [getattr(key, what) for key in keys]
            twice = next((key.name for i, key in enumerate(keys) if seen[i] in seen[:i]), None)
            if twice is not None:
                raise ValueError(f"two keys have the same {what}, one of them {twice!r}")
        return keys


class KeyRing:
    """The valid keys."""

    def __init__(self, keys: Collection[ApiKey] = ()) -> None:
        self._keys = [(bytes.fromhex(key.sha256), key) for key in keys]

    def find(self, secret: bytes) -> ApiKey | None:
        """Returns the key of that secret, or None.

        Compares it with every key, so that the time reveals neither whether one matched nor which.
        """
        digest, found = hashlib.sha256(secret).digest(), None
        for known, key in self._keys:
            if hmac.compare_digest(digest, known):
                found = key
        return found

    def named(self, name: str) -> ApiKey | None:
        return next((key for _, key in self._keys if key.name == name), None)


def new_key(name: str, limits: KeyLimits) -> tuple[str, ApiKey]:
    """Returns the secret, which is not stored, and its entry in the key file.

    Raises pydantic's ValidationError for a bad name.
    """
    secret = PREFIX + secrets.token_urlsafe(_NUM_BYTES)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    return secret, ApiKey(name=name, sha256=digest, created=date.today(), limits=limits)


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Reads a key file. Raises KeyFault with one line per mistake, or FileNotFoundError if there is no file."""
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError:
        where = path.absolute()
        raise FileNotFoundError(
            f"{where} does not exist: `relay key create NAME --file {where}` makes it"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = (
            error.strerror if isinstance(error, OSError) else "it is not valid YAML"
        )  # a parser's error quotes the file
        raise KeyFault(f"{path.absolute()} cannot be read: {why}") from None
    mistakes = find_mistakes(KeyList, content)
    if mistakes:
        raise KeyFault("\n".join(f"{path}: {_SECRET.sub(f'{PREFIX}…', line)}" for line in mistakes))
    return KeyList.model_validate(content).keys


def write_keys(path: Path, keys: Sequence[ApiKey]) -> None:
    """Writes the file atomically: a reader sees the old content or the new. A new file gets mode 0600."""
    path = path.resolve()  # replaces the target of a link, not the link
    text = HEAD + yaml.safe_dump(
        KeyList(keys=tuple(keys)).model_dump(exclude_defaults=True) or {"keys": []}, sort_keys=False
    )
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.chmod(mode)
    part.replace(path)

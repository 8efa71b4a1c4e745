"""Keys, as they are kept: by their hashes, in one YAML file.

A key is 256 random bits, so SHA-256 keeps it: nobody can try so many. What makes a password's hash slow makes up
for how few passwords people choose; here it would only cost each request a tenth of a second.
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
"""By which people, and scanners of repositories, know what a lost key opens."""
_SECRET = re.compile(PREFIX + r"[\w-]+")
"""Somebody may have put one where it does not belong, and errors quote what they found."""
_NUM_BYTES = 32
_HEX_DIGITS = 64
HEAD = """\
# Keys of Latent Relay, by `relay key`: their hashes alone. Limits may be changed here, too, and all is read again
# when it changes; docs/keys.md tells what there is.
"""


class KeyFault(ValueError):
    """A file of keys that cannot be read or used; says why."""


class KeyLimits(Config):
    """What one key may ask for. What is left out has no limit."""

    requests_per_minute: int | None = Field(None, ge=1, description="in any 60 s")
    max_concurrent_requests: int | None = Field(None, ge=1, description="in progress at once")
    budget_megapixel_steps: float | None = Field(
        None, gt=0, description="in each `budget_period`: of each picture, width x height x frames x steps / 10⁶"
    )
    budget_period: Period = Field("day", description="as the calendar has them, in UTC")


class ApiKey(Config):
    """Whose it is, how it is known again, and what it may."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$", description="in logs and metrics")
    sha256: str
    created: date
    limits: KeyLimits = KeyLimits()

    @field_validator("sha256")
    @classmethod
    def _check_hash(cls, value: str) -> str:
        """The mistake is told without the value: somebody may have put a key there."""
        if len(value) != _HEX_DIGITS or not all(digit in "0123456789abcdef" for digit in value):
            raise ValueError(f"{_HEX_DIGITS} digits of 0-9 and a-f are a hash; `relay key create` writes one")
        return value


class KeyList(Config):
    """The whole file."""

    keys: tuple[ApiKey, ...] = ()

    @field_validator("keys")
    @classmethod
    def _check_unique(cls, keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        for what in ("name", "sha256"):
            seen = [getattr(key, what) for key in keys]
            twice = next((key.name for i, key in enumerate(keys) if seen[i] in seen[:i]), None)
            if twice is not None:
                raise ValueError(f"two keys have the {what} of {twice!r}")
        return keys


class KeyRing:
    """The keys that open."""

    def __init__(self, keys: Collection[ApiKey] = ()) -> None:
        self._keys = [(bytes.fromhex(key.sha256), key) for key in keys]

    def find(self, secret: bytes) -> ApiKey | None:
        """Compared with every key to the end, so the time tells neither whether there is one nor which."""
        digest, found = hashlib.sha256(secret).digest(), None
        for known, key in self._keys:
            if hmac.compare_digest(digest, known):
                found = key
        return found


def new_key(name: str, limits: KeyLimits) -> tuple[str, ApiKey]:
    """The key itself, which nobody keeps, and what is kept. Raises pydantic's ValidationError for a bad name."""
    secret = PREFIX + secrets.token_urlsafe(_NUM_BYTES)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    return secret, ApiKey(name=name, sha256=digest, created=date.today(), limits=limits)


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Raises KeyFault, with a line per mistake; FileNotFoundError where there is no file."""
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError:
        where = path.absolute()
        raise FileNotFoundError(
            f"{where} does not exist: `relay key create NAME --file {where}` makes it"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no YAML"  # a parser's error quotes its text
        raise KeyFault(f"{path.absolute()} cannot be read: {why}") from None
    mistakes = find_mistakes(KeyList, content)
    if mistakes:
        raise KeyFault("\n".join(f"{path}: {_SECRET.sub(f'{PREFIX}…', line)}" for line in mistakes))
    return KeyList.model_validate(content).keys


def write_keys(path: Path, keys: Sequence[ApiKey]) -> None:
    """At once: whoever reads meanwhile sees the old file or the new one. A new file is its owner's alone."""
    path = path.resolve()  # what a link points to is replaced, not the link
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

"""What a config says of who may ask."""

import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, field_validator

from cluster.config import Config

KEYS_FILE = "~/.config/latent-relay/keys.yaml"
"""Unless said otherwise, here and by `relay key`."""
_ORIGIN = re.compile(r"https?://[^/?#\s]+")


class AuthConfig(Config):
    """Requests need a key: `Authorization: Bearer KEY`. Left out, none is asked for."""

    keys_file: str = Field(
        KEYS_FILE, description="hashes of the keys, on the node of each ingress; `relay key create NAME` writes it"
    )
    usage_file: str | None = Field(
        None,
        description="what the keys have used of their budgets, there too; left out: beside `keys_file`, by the "
        "application's name",
    )

    @property
    def keys_path(self) -> Path:
        return Path(self.keys_file).expanduser()

    def usage_path(self, app_name: str) -> Path:
        """Each application counts for itself."""
        beside = self.keys_path.with_name(f"{self.keys_path.stem}.{app_name.replace('/', '_')}.usage.json")
        return beside if self.usage_file is None else Path(self.usage_file).expanduser()


class CorsConfig(Config):
    """Pages of other origins may ask by a browser. Left out, none may."""

    origins: tuple[str, ...] = Field(
        description='such as `["https://shop.example"]`, without a path; `["*"]` stands for all'
    )

    @field_validator("origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"an origin is SCHEME://HOST or SCHEME://HOST:PORT, got {origin!r}")
        return origins


@dataclass(frozen=True)
class Access:
    """Who may ask."""

    auth: AuthConfig | None = None
    cors: CorsConfig | None = None
    is_open: bool = False
    """Whether everybody may where no key is asked for."""


NOBODY_ELSE = Access()
"""No key is asked for, so only this machine may ask."""

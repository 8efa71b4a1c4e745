"""The config sections for access: API keys and CORS."""

import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, field_validator

from cluster.config import Config

KEYS_FILE = "~/.config/latent-relay/keys.yaml"
"""Default path of the key file, both in the config and in `relay key`."""
_ORIGIN = re.compile(r"https?://[^/?#\s]+")


class AuthConfig(Config):
    """Requests need a key: `Authorization: Bearer KEY`. Without this section, no key is needed."""

    keys_file: str = Field(
        KEYS_FILE,
        description="file of the keys' hashes, on the node of each ingress; `relay key create NAME` writes it",
    )
    usage_file: str | None = Field(
        None,
        description="file that records how much of their budgets the keys have used, on the same node; default: a "
        "file beside `keys_file`, named after the application",
    )

    @property
    def keys_path(self) -> Path:
        return Path(self.keys_file).expanduser()

    def usage_path(self, app_name: str) -> Path:
        """Returns the usage file's path. The default is named after the application: each counts for itself."""
        beside = self.keys_path.with_name(f"{self.keys_path.stem}.{app_name.replace('/', '_')}.usage.json")
        return beside if self.usage_file is None else Path(self.usage_file).expanduser()


class CorsConfig(Config):
    """Web pages of other origins may send requests. Without this section, none may."""

    origins: tuple[str, ...] = Field(
        description='allowed origins, without a path, such as `["https://shop.example"]`; `["*"]` allows all'
    )

    @field_validator("origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"an origin must be SCHEME://HOST or SCHEME://HOST:PORT, got {origin!r}")
        return origins


@dataclass(frozen=True)
class Access:
    """The access rules of one application."""

    auth: AuthConfig | None = None
    cors: CorsConfig | None = None
    is_open: bool = False
    """Whether a server without keys may be reached from other machines."""


LOCAL_ACCESS = Access()
"""No key is needed, so only this machine may send requests."""

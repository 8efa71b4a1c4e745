"""An app that asks for keys, and the keys that open it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from openai import OpenAI

from serve_app.auth.keys import ApiKey, KeyLimits, new_key

if TYPE_CHECKING:
    from tests.conftest import App

ENDLESS = 100_000
"""Steps; no request of so many ends within a test."""
PICTURE = 64 * 64 * 4 / 1e6
"""Megapixel-steps of one by the defaults."""
LIMITS = {
    "shop": KeyLimits(),
    "rated": KeyLimits(requests_per_minute=5),
    "alone": KeyLimits(max_concurrent_requests=1),
    "poor": KeyLimits(budget_megapixel_steps=3 * PICTURE, budget_period="month"),
    "poorer": KeyLimits(budget_megapixel_steps=4 * PICTURE, budget_period="month"),
    "hasty": KeyLimits(budget_megapixel_steps=1.5 * 64 * 64 * ENDLESS / 1e6, budget_period="month"),
    "revoked": KeyLimits(),
    "address": KeyLimits(),
    "lost": KeyLimits(requests_per_minute=1),
}
ORIGIN = "https://shop.example"
"""Whose pages may ask."""
CAT = {"prompt": "a cat", "seed": 1}
GENERATIONS = "/v1/images/generations"


def make_keys() -> tuple[dict[str, str], list[ApiKey]]:
    """By name what is sent, and what is kept."""
    made = {name: new_key(name, limits) for name, limits in LIMITS.items()}
    return {name: secret for name, (secret, _) in made.items()}, [key for _, key in made.values()]


class KeyedApp:
    """With two ingresses."""

    def __init__(self, app: "App", file: Path, secrets: dict[str, str]) -> None:
        self.app, self.file, self.secrets = app, file, secrets

    def ask(
        self, name: str | None, method: str = "POST", path: str = GENERATIONS, **options: Any
    ) -> httpx.Response:
        """By a key's name; None: without a key."""
        headers = {} if name is None else {"Authorization": f"Bearer {self.secrets[name]}"}
        if method == "POST":
            options = {"json": CAT} | options
        return self.app.client.request(method, path, headers=headers | options.pop("headers", {}), **options)

    def openai(self, secret: str) -> OpenAI:
        return OpenAI(base_url=f"{self.app.url}/v1", api_key=secret, max_retries=0)

"""An app that requires keys, and its keys."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from openai import OpenAI

from serve_app.auth.keys import ApiKey, KeyLimits, new_key

if TYPE_CHECKING:
    from tests.app import App

ENDLESS = 100_000
"""Steps: no request with this many ends within a test."""
FOREVER_S = 1e6
"""A timeout that even so many steps can meet: otherwise they are refused once their size has been measured."""
UNMEASURED = "32x128"
"""A size with as many pixels as all others, of which no image is ever finished."""
UNMEASURED_TOO = "128x32"
"""For one test only: once a size has been measured, requests that cannot meet their deadline are refused at the
start."""
PICTURE = 64 * 64 * 4 / 1e6
"""Megapixel-steps of one image with the default settings."""
LIMITS = {
    "shop": KeyLimits(),
    "rated": KeyLimits(requests_per_minute=5),
    "alone": KeyLimits(max_concurrent_requests=1),
    "poor": KeyLimits(budget_megapixel_steps=3 * PICTURE, budget_period="month"),
    "poorer": KeyLimits(budget_megapixel_steps=4 * PICTURE, budget_period="month"),
    "hasty": KeyLimits(budget_megapixel_steps=1.5 * 64 * 64 * ENDLESS / 1e6, budget_period="month"),
    "frugal": KeyLimits(budget_megapixel_steps=1.6 * PICTURE, budget_period="month"),
    "patient": KeyLimits(budget_megapixel_steps=1.5 * 64 * 64 * ENDLESS / 1e6, budget_period="month"),
    "small": KeyLimits(max_megapixel_steps=2 * PICTURE),
    "revoked": KeyLimits(),
    "address": KeyLimits(),
    "lost": KeyLimits(requests_per_minute=1),
}
ORIGIN = "https://shop.example"
"""Origin whose pages may send requests."""
CAT = {"prompt": "a cat", "seed": 1}
GENERATIONS = "/v1/images/generations"


def make_keys() -> tuple[dict[str, str], list[ApiKey]]:
    """Returns the secrets that clients send, by name, and the keys that are stored."""
    made = {name: new_key(name, limits) for name, limits in LIMITS.items()}
    return {name: secret for name, (secret, _) in made.items()}, [key for _, key in made.values()]


class KeyedApp:
    """An app with keys and two ingresses."""

    def __init__(self, app: "App", file: Path, secrets: dict[str, str]) -> None:
        self.app, self.file, self.secrets = app, file, secrets

    def ask(
        self, name: str | None, method: str = "POST", path: str = GENERATIONS, **options: Any
    ) -> httpx.Response:
        """Sends a request with the key of this name; None: without a key."""
        headers = {} if name is None else {"Authorization": f"Bearer {self.secrets[name]}"}
        if method == "POST":
            options = {"json": CAT} | options
        return self.app.client.request(method, path, headers=headers | options.pop("headers", {}), **options)

    def openai(self, secret: str) -> OpenAI:
        return OpenAI(base_url=f"{self.app.url}/v1", api_key=secret, max_retries=0)

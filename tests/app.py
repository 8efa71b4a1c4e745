"""A served tiny checkpoint, as tests use it."""

import time
from typing import Any

import httpx
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.config.model import ModelConfig

PATIENCE_S = 60.0


class App:
    """A served tiny checkpoint, with a client and handles for it."""

    def __init__(self, url: str, name: str, handle: DeploymentHandle, model: ModelConfig) -> None:
        self.url, self.name, self.handle = f"{url}/{name}", name, handle
        self.model, self.family = model, model.architecture
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def deployment(self, name: str) -> DeploymentHandle:
        """Returns a handle. `_check_exists` is off because a test may want a deployment that does not exist."""
        return serve.get_deployment_handle(name, self.name, _check_exists=False)

    def status(self) -> dict[str, Any]:
        """Returns a status no older than this call: GET /v1/status may return an earlier one."""
        began = time.monotonic()
        while True:
            told: dict[str, Any] = self.client.get("/v1/status").json()
            if told["age_s"] < time.monotonic() - began:
                return told
            time.sleep(0.1)

    def wait_for_seats(self, num_seats: int) -> None:
        """Waits until this number of requests is in the transformer."""
        deadline = time.monotonic() + PATIENCE_S
        while self.deployment("Transformer").stats.remote().result().queue.num_seats != num_seats:
            assert time.monotonic() < deadline, f"there never were {num_seats} requests in the transformer"
            time.sleep(0.02)

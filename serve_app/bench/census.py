"""Reads the stats of the served app's stages: work done, requests in progress, and work that was done twice."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from deployments.stages.stats import EncoderStats, TransformerStats
from serve_app.bench.answers import TIMEOUT_S, Body
from serve_app.bench.report import Row
from serve_app.config.serve_file import APP_NAME


@dataclass(frozen=True)
class Census:
    """What one replica of each stage has done since it started."""

    encoder: EncoderStats
    transformer: TransformerStats

    @property
    def num_encoded(self) -> int:
        """Calls of `encode` that the encoder has answered."""
        return self.encoder.num_forwards + self.encoder.num_cache_hits

    @property
    def num_steps(self) -> int:
        """Forwards of the transformer. FLUX needs one per step."""
        return sum(size * times for size, times in self.transformer.queue.batch_sizes.items())


async def snapshot_stats() -> Census:
    return Census(await ask("Encoder"), await ask("Transformer"))


async def until_seated(num_requests: int) -> None:
    """Waits until at least num_requests requests have a seat in the transformer."""
    async with asyncio.timeout(TIMEOUT_S):
        while (await ask("Transformer")).queue.num_seats < num_requests:
            await asyncio.sleep(0.01)


async def until_idle(app: str = APP_NAME) -> None:
    """Waits until no request is in the transformer. One whose connection was lost goes on for a while."""
    async with asyncio.timeout(TIMEOUT_S):
        while (await ask("Transformer", app)).queue.num_seats:
            await asyncio.sleep(0.1)


async def ask(deployment: str, app: str = APP_NAME) -> Any:
    """Returns a deployment's stats. Retries while it has no replica."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            try:
                return await serve.get_deployment_handle(deployment, app).stats.remote()
            except (RayError, RayServeException):
                await asyncio.sleep(0.1)


def recomputed_work(before: Census, after: Census, running: Sequence[Body], new: Sequence[Body]) -> Row:
    """Returns the number of encodings and steps beyond the necessary ones.

    A stage that has survived has counted its work for all requests; one that has restarted since, at most that for
    the new requests.
    """
    num_encoded, num_steps = len(new), sum(body["num_inference_steps"] for body in new)
    if before.encoder.pid == after.encoder.pid:
        num_encoded += before.num_encoded + len(running)
    if before.transformer.ranks[0].pid == after.transformer.ranks[0].pid:
        num_steps += before.num_steps + sum(body["num_inference_steps"] for body in running)
    return {
        "encoded_again": max(0, after.num_encoded - num_encoded),
        "steps_again": max(0, after.num_steps - num_steps),
    }

"""Runs mixed load for any length of time on one served app, whose processes must not hold more and more.

Sizes, steps, tiers, numbers of images and formats are random; some requests stream, some are aborted at any
moment, some must be rejected. Each client sends its next request when one has ended.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from serve_app.bench.answers import Body, Judge, open_client, post
from serve_app.bench.census import until_idle
from serve_app.bench.holdings import Holding, Sample, count_objects, growth, hold_all
from serve_app.bench.progress import Progress
from serve_app.bench.report import Row, report
from serve_app.bench.tiny_app import serving, tiny_config
from serve_app.bench.whole import PlainPipeline
from serve_app.config.serve_file import APP_NAME

PATH = "/v1/images/generations"
NUM_CLIENTS = 8
SAMPLE_S = 5.0
WARM_UP = 0.3
"""Share of the time before sampling begins, in which thread pools and caches grow to the size that they need."""
SETTLE_S = 12.0
"""Time from the last request to the idle count, in which keep-alive connections end."""
COMPARED_EVERY = 25
"""One in this many requests of kind `_draw` is compared with the plain pipeline."""
MAX_LEFT_AFTER_S = 1.0

BAD: tuple[tuple[Body, int], ...] = (
    ({}, 400),
    ({"prompt": ""}, 400),
    ({"prompt": "a", "size": "1x1"}, 400),
    ({"prompt": "a", "num_inference_steps": -1}, 400),
    ({"prompt": "a", "n": 10**9}, 400),
    ({"prompt": "a", "no_such_field": 1}, 400),
    ({"prompt": "a", "model": "no-such-model"}, 404),
)


@dataclass(frozen=True)
class Outcomes:
    """The results of all requests."""

    counts: Counter[str]
    drawn: list[tuple[Body, bytes]]
    """Bodies and images that are to be compared with the plain pipeline's."""


def run(*, minutes: float, seed: int, json_file: Path | None) -> None:
    """Reports a row for each process (`growth`) with the numbers of Ray objects, and prints the outcomes' counts.

    Raises RuntimeError if an answer was wrong.
    """
    config = tiny_config()
    judge = Judge(PlainPipeline(config))
    with serving(config) as (url, _):
        rows, outcomes = asyncio.run(soak(url, APP_NAME, seconds=60 * minutes, seed=seed))
        judged = judge.judge([body for body, _ in outcomes.drawn], [picture for _, picture in outcomes.drawn])
    Console().print({**outcomes.counts, "grey_levels": judged["grey_levels"]})
    report(f"{minutes:g} minutes, {sum(outcomes.counts.values())} requests", rows, json_file)
    if outcomes.counts["wrong"] or int(judged["grey_levels"]) > 1:
        raise RuntimeError(f"some answers were wrong: {dict(outcomes.counts)}, {judged}")


async def soak(url: str, app: str, *, seconds: float, seed: int) -> tuple[list[Row], Outcomes]:
    """Runs the load on an app that is served at `url`, by a Ray that this process has started."""
    outcomes, samples = Outcomes(Counter(), []), []
    before: tuple[dict[str, Holding], int] | None = None
    began = time.monotonic()
    with Progress() as progress:
        task = progress.add_task("soak", total=seconds)
        for part in (WARM_UP, 1 - WARM_UP):
            is_over = asyncio.Event()
            clients = [
                asyncio.create_task(_client(url, random.Random(f"{seed}.{part}.{i}"), outcomes, is_over.is_set))
                for i in range(NUM_CLIENTS)
            ]
            ends = time.monotonic() + part * seconds
            while (left_s := ends - time.monotonic()) > 0:
                await asyncio.sleep(min(SAMPLE_S, left_s))
                progress.update(task, completed=time.monotonic() - began)
                if before is not None:
                    samples.append(Sample(outcomes.counts.total(), hold_all(app)))
            is_over.set()
            await asyncio.gather(*clients)
            await until_idle(app)
            await asyncio.sleep(SETTLE_S)
            if before is None:
                before = hold_all(app), count_objects()
    assert before is not None
    rows = growth(samples, (before[0], hold_all(app)))
    left = {"objects": before[1], "objects_after": count_objects()}
    return [dict(row) | left for row in rows], outcomes


async def _client(url: str, chance: random.Random, outcomes: Outcomes, is_over: Callable[[], bool]) -> None:
    acts = (_draw, _stream, _leave, _err)
    async with open_client(url) as client:
        while not is_over():
            [act] = chance.choices(acts, weights=(60, 15, 15, 10))
            outcome = await act(client, chance, outcomes)
            outcomes.counts[outcome] += 1


async def _draw(client: httpx.AsyncClient, chance: random.Random, outcomes: Outcomes) -> str:
    body = _body(chance)
    if not chance.randrange(COMPARED_EVERY):
        body |= {"n": 1, "output_format": "png", "quality": "high"}
        outcomes.drawn.append((body, await post(client, body)))
        return "compared"
    answer = await client.post(PATH, json=body)
    is_right = answer.status_code == 200 and len(answer.json()["data"]) == body["n"]
    return "answered" if is_right else _wrong(answer)


async def _stream(client: httpx.AsyncClient, chance: random.Random, _outcomes: Outcomes) -> str:
    body = _body(chance) | {"n": 1, "stream": True, "progress": True, "partial_images": chance.randrange(4)}
    async with client.stream("POST", PATH, json=body) as answer:
        lines = [line async for line in answer.aiter_lines() if line.startswith("data: ")]
    last = json.loads(lines[-1].removeprefix("data: ")) if lines else {}
    is_right = last.get("type") == "image_generation.completed"
    return "streamed" if is_right else _wrong(answer)


async def _leave(client: httpx.AsyncClient, chance: random.Random, _outcomes: Outcomes) -> str:
    body = _body(chance) | {"num_inference_steps": 50, "stream": bool(chance.randrange(2)), "n": 1}
    asking = asyncio.create_task(client.post(PATH, json=body))
    await asyncio.sleep(chance.uniform(0, MAX_LEFT_AFTER_S))
    asking.cancel()  # closes the connection
    await asyncio.gather(asking, return_exceptions=True)
    return "left"


async def _err(client: httpx.AsyncClient, chance: random.Random, _outcomes: Outcomes) -> str:
    body, status = chance.choice(BAD)
    answer = await client.post(PATH, json=body)
    return "refused" if answer.status_code == status else _wrong(answer)


def _wrong(answer: httpx.Response) -> str:
    Console().print(f"wrong: {answer.status_code} to {answer.request.content[:200]!r}")
    return "wrong"


def _body(chance: random.Random) -> Body:
    width, height = (16 * chance.randint(4, 12) for _ in range(2))
    body: dict[str, Any] = {
        "prompt": f"prompt {chance.randrange(50)}",
        "seed": chance.randrange(2**32),
        "size": f"{width}x{height}",
        "num_inference_steps": chance.randint(1, 12),
        "n": chance.choice((1, 1, 1, 2)),
        "output_format": chance.choice(("png", "png", "jpeg", "webp")),
    }
    if not chance.randrange(3):
        body["quality"] = chance.choice(("low", "medium"))
    return body

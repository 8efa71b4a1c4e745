"""Loads a server with five times its capacity: goodput, time to a rejection, and accuracy of Retry-After.

First measures the capacity, with clients that each wait for their image; then sends requests at set times,
whether or not earlier ones were answered, each with a deadline. Goodput is the rate of requests that are answered
within their deadline.
"""

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from serve_app.bench.report import Row, report
from serve_app.bench.serving import serving

NUM_CLIENTS = 8
"""The default size of a micro-batch: more clients do not raise the rate."""
OVERLOAD = 5.0
IN_LINE = 12
"""A deadline leaves time for this many images before the request's own."""
PATH = "/v1/images/generations"

Measures = Mapping[str, float]


@dataclass(frozen=True)
class Answer:
    """The result of one request. Times are from the beginning of its phase."""

    asked_s: float
    answered_s: float
    status: int
    retry_after_s: int | None = None

    @property
    def took_s(self) -> float:
        return self.answered_s - self.asked_s


def run(config_file: Path, *, port: int, num_steps: int, duration_s: float, json_file: Path | None) -> None:
    """Reports rows of `measure`, `closed` and `open` loop. The measures:

    asked_per_s, done_per_s: all requests, and those answered within the deadline. over_peak: done_per_s over the
        rate of the closed loop.
    refused, refused_p50_ms, refused_p99_ms: number of 429s, and the time until they came.
    late: number of 504s, and of images after their deadline. p99_over_deadline: p99 latency of all accepted
        requests, over the deadline.
    told_p50_s, room_p50_s: Retry-After, and the time from a rejection until a request was accepted again.
    errors: all other answers.
    """
    with serving(config_file, port):
        closed, opened = asyncio.run(_measure(f"http://127.0.0.1:{port}", num_steps, duration_s))
    rows: list[Row] = [{"measure": name, "closed": closed[name], "open": opened[name]} for name in closed]
    report(f"{OVERLOAD:g} x capacity, {config_file.stem}", rows, json_file)


async def _measure(url: str, num_steps: int, duration_s: float) -> tuple[Measures, Measures]:
    """Returns the measures of the closed loop and of the open one."""
    async with _client(url) as client:
        await _closed_loop(client, num_steps, duration_s / 4)  # warm-up
        closed = await _closed_loop(client, num_steps, duration_s / 2)
        span_s = max(answer.answered_s for answer in closed)
        peak = len(closed) / span_s
        deadline_s = IN_LINE / peak
        opened = await _open_loop(client, num_steps, OVERLOAD * peak, deadline_s, duration_s + deadline_s)
    return (
        summarize(closed, 0.0, span_s, deadline_s, peak),
        summarize(opened, deadline_s, duration_s + deadline_s, deadline_s, peak),
    )


def summarize(answers: Sequence[Answer], from_s: float, to_s: float, deadline_s: float, peak: float) -> Measures:
    """Returns the measures of a phase between two times. Before from_s, its queue has not yet filled."""
    seen = [answer for answer in answers if from_s <= answer.answered_s <= to_s]
    taken = [answer for answer in seen if answer.status in (200, 504)]
    done = [answer for answer in taken if answer.status == 200 and answer.took_s <= deadline_s]
    refused = [answer for answer in seen if answer.status == 429]
    per_s = len(done) / (to_s - from_s)
    return {
        "asked_per_s": sum(from_s <= answer.asked_s <= to_s for answer in answers) / (to_s - from_s),
        "done_per_s": per_s,
        "over_peak": per_s / peak,
        "refused": len(refused),
        "refused_p50_ms": _quantile([1e3 * answer.took_s for answer in refused], 0.5),
        "refused_p99_ms": _quantile([1e3 * answer.took_s for answer in refused], 0.99),
        "late": len(taken) - len(done),
        "deadline_s": deadline_s,
        "p99_over_deadline": _quantile([answer.took_s for answer in taken], 0.99) / deadline_s,
        "told_p50_s": _quantile([float(answer.retry_after_s or 0) for answer in refused], 0.5),
        "room_p50_s": _quantile(_until_room(answers, refused), 0.5),
        "errors": len(seen) - len(taken) - len(refused),
    }


def _until_room(answers: Sequence[Answer], refused: Sequence[Answer]) -> list[float]:
    """Returns the seconds from each rejection until a request was sent that was accepted."""
    taken = sorted(answer.asked_s for answer in answers if answer.status == 200)
    waits = []
    for rejection in refused:
        later = next((asked_s for asked_s in taken if asked_s > rejection.asked_s), None)
        waits += [] if later is None else [later - rejection.asked_s]
    return waits


def _quantile(values: Sequence[float], share: float) -> float:
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[round(100 * share) - 1]


@asynccontextmanager
async def _client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        yield client


async def _closed_loop(client: httpx.AsyncClient, num_steps: int, duration_s: float) -> list[Answer]:
    began, answers = time.perf_counter(), list[Answer]()

    async def draw_on(seed: int) -> None:
        while time.perf_counter() - began < duration_s:
            answers.append(await _ask(client, began, {"num_inference_steps": num_steps, "seed": seed}))

    await asyncio.gather(*(draw_on(seed) for seed in range(NUM_CLIENTS)))
    return answers


async def _open_loop(
    client: httpx.AsyncClient, num_steps: int, per_s: float, deadline_s: float, duration_s: float
) -> list[Answer]:
    """Sends requests as a Poisson process, which is the same in every run."""
    chance, began = random.Random(0), time.perf_counter()
    asking: list[asyncio.Task[Answer]] = []
    at_s = chance.expovariate(per_s)
    while at_s < duration_s:
        await asyncio.sleep(max(0.0, began + at_s - time.perf_counter()))
        body = {"num_inference_steps": num_steps, "deadline_s": deadline_s, "seed": len(asking)}
        asking.append(asyncio.create_task(_ask(client, began, body)))
        at_s += chance.expovariate(per_s)
    return list(await asyncio.gather(*asking))


async def _ask(client: httpx.AsyncClient, began: float, body: dict[str, float]) -> Answer:
    asked_s = time.perf_counter() - began
    answer = await client.post(PATH, json={"prompt": "a red circle"} | body)
    told = answer.headers.get("Retry-After")
    return Answer(asked_s, time.perf_counter() - began, answer.status_code, None if told is None else int(told))

"""Every process that serves is killed, told to go, and stopped for a while, idle and under eight requests.

Also a request that kills whatever denoises it, and clients that leave. All of it over HTTP, on one served tiny
FLUX of two shards; the plain pipeline in this process knows the right pictures.
"""

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from rich.progress import track

from deployments.stats import EncoderStats, TransformerStats
from serve_app.app import build_app
from serve_app.bench.answers import TIMEOUT_S, Body, Judge, open_client, post
from serve_app.bench.processes import TITLES, count_zombies, find_processes, is_alive, shared_memory_bytes
from serve_app.bench.report import Row, report
from serve_app.bench.whole import PlainPipeline
from serve_app.config import APP_NAME, AppConfig, parse_app_config

PROCESSES = tuple(TITLES)
SIGNALS = ("SIGKILL", "SIGTERM", "SIGSTOP")
WHEN = ("loaded", "idle")
STOPPED_S = 20.0
"""From SIGSTOP to SIGCONT."""
NUM_REQUESTS = 8
NUM_STEPS = 200
NUM_PROBE_STEPS = 4
MANY_STEPS = 20_000
"""So many that a request which is not cancelled outlasts all others."""
ATTEMPT_S = 60.0
"""A new request that is not answered for so long hangs; it is sent again."""
SETTLE_S = 120.0
"""For replicas to be as many as before, and for what was told to go to end what it has."""


@dataclass(frozen=True)
class Cell:
    """One fault."""

    process: str
    signal: str
    when: str


QUICK = (
    Cell("rank 0", "SIGKILL", "loaded"),
    Cell("rank 0", "SIGTERM", "loaded"),
    Cell("rank 1", "SIGTERM", "loaded"),
    Cell("encoder", "SIGKILL", "loaded"),
    Cell("ingress", "SIGTERM", "idle"),
    Cell("HTTP proxy", "SIGTERM", "idle"),
)


def run(*, cells: Sequence[Cell], json_file: Path | None) -> None:
    """A row for each cell, and two more: a request that kills, and clients that leave.

    answered, grey_levels: pictures, of the accepted requests and of the new one that was sent after the signal,
        and their largest difference from the plain pipeline's.
    refused: answered with a 5xx in our form; whoever is neither answered nor refused is lost.
    door_s: from the signal to the answer of the new request, which is sent again if it fails or hangs; for clients
        that leave, until their seats are free.
    encoded_again, steps_again: work done twice, as far as the processes tell that live at the end.
    left_over: processes that should have ended and have not; for clients that leave, seats. zombies: ended, but
        not reaped. shm_bytes: what /dev/shm holds more than before.
    """
    config = _config()
    judge = Judge(PlainPipeline(config))
    rows: list[Row] = []
    with _serving(config) as url:
        bench = Faults(url, judge)
        for cell in track(cells, description="faults"):
            rows.append(asyncio.run(bench.fault(cell)))
            print(rows[-1], flush=True)
        rows += [asyncio.run(bench.killer()), asyncio.run(bench.leave())]
    report("faults, and what follows", rows, json_file)


@dataclass(frozen=True)
class Census:
    """What the processes have done that matter for doing work twice."""

    encoder: EncoderStats
    transformer: TransformerStats

    @property
    def num_encoded(self) -> int:
        """Calls of `encode` that the encoder has answered."""
        return self.encoder.num_forwards + self.encoder.num_cache_hits

    @property
    def num_steps(self) -> int:
        """Forwards of the transformer; FLUX needs one for a step."""
        return sum(size * times for size, times in self.transformer.queue.batch_sizes.items())


class Faults:
    """The scenarios, one after another on one app."""

    def __init__(self, url: str, judge: Judge) -> None:
        self._url, self._judge = url, judge
        self._num_probes = 0

    async def fault(self, cell: Cell) -> Row:
        """All requests that run have been encoded when it happens, and none is denoised."""
        running = [_body(i) for i in range(NUM_REQUESTS)] if cell.when == "loaded" else []
        before, processes, shm = await _census(), find_processes(), shared_memory_bytes()
        num_probes = self._num_probes
        [victim, *_] = processes[cell.process]
        async with open_client(self._url) as client:
            posts = [asyncio.create_task(post(client, body)) for body in running]
            await _until_seated(len(running))
            sent_at = time.perf_counter()
            os.kill(victim, signal.Signals[cell.signal])
            probing = asyncio.create_task(self._probe())
            if cell.signal == "SIGSTOP":
                await asyncio.sleep(STOPPED_S)
                if is_alive(victim):
                    os.kill(victim, signal.SIGCONT)
            answers = await asyncio.gather(*posts, return_exceptions=True)
            probe, picture, answered_at = await probing
        left_over = await self._settle(cell, processes)
        return {
            "process": cell.process,
            "signal": cell.signal,
            "when": cell.when,
            "signals": 1,
            **self._judged([*running, probe], [*answers, picture]),
            "door_s": answered_at - sent_at,
            **_again(before, await _census(), running, self._num_probes - num_probes),
            "left_over": left_over,
            "zombies": count_zombies(),
            "shm_bytes": max(0, shared_memory_bytes() - shm),
        }

    async def killer(self) -> Row:
        """Of eight requests, each time that one is at a step the transformer's process is killed."""
        bodies = [_body(i) for i in range(NUM_REQUESTS)]
        killer, innocent = bodies[0] | {"stream": True, "progress": True}, bodies[1:]
        processes, shm = find_processes(), shared_memory_bytes()
        killed: list[int] = []
        async with open_client(self._url) as client:
            posts = [asyncio.create_task(post(client, body)) for body in innocent]
            await _until_seated(len(innocent))
            began = time.perf_counter()
            async with aclosing(_lines(client, killer)) as lines:
                async for line in lines:
                    [pid, *_] = find_processes()["rank 0"] or [0]
                    if '"denoise"' in line and pid and pid not in killed:
                        os.kill(pid, signal.SIGKILL)
                        killed.append(pid)
            given_up_at = time.perf_counter()
            answers = await asyncio.gather(*posts, return_exceptions=True)
        left_over = await self._settle(Cell("rank 0", "SIGKILL", "loaded"), processes)
        return {
            "process": "rank 0",
            "signal": "SIGKILL",
            "when": "whenever one request runs",
            "signals": len(killed),
            **self._judged(innocent, answers),
            "door_s": given_up_at - began,
            "encoded_again": "",
            "steps_again": "",
            "left_over": left_over,
            "zombies": count_zombies(),
            "shm_bytes": max(0, shared_memory_bytes() - shm),
        }

    async def leave(self) -> Row:
        """Half of the clients close their connections; the others' pictures come all the same."""
        bodies = [_body(i) for i in range(NUM_REQUESTS)]
        staying, leaving = bodies[::2], [body | {"num_inference_steps": MANY_STEPS} for body in bodies[1::2]]
        async with open_client(self._url) as client:
            leavers = [asyncio.create_task(post(client, body)) for body in leaving]
            posts = [asyncio.create_task(post(client, body)) for body in staying]
            await _until_seated(NUM_REQUESTS)
            for leaver in leavers:
                leaver.cancel()  # closes its connection
            left_at = time.perf_counter()
            while (await _ask("Transformer")).queue.num_seats > len(staying):
                await asyncio.sleep(0.01)
            free_at = time.perf_counter()
            answers = await asyncio.gather(*posts)
        return {
            "process": "client",
            "signal": "leaves",
            "when": "loaded",
            "signals": len(leaving),
            **self._judged(staying, answers),
            "door_s": free_at - left_at,
            "encoded_again": 0,
            "steps_again": 0,
            "left_over": (await _ask("Transformer")).queue.num_seats,
            "zombies": count_zombies(),
            "shm_bytes": 0,
        }

    async def _probe(self) -> tuple[Body, bytes, float]:
        """A new request, over a connection of its own each time, until there is a picture: that, and when."""
        while True:
            self._num_probes += 1
            body = _body(NUM_REQUESTS + self._num_probes) | {"num_inference_steps": NUM_PROBE_STEPS}
            try:
                async with open_client(self._url) as client, asyncio.timeout(ATTEMPT_S):
                    picture = await post(client, body)
                return body, picture, time.perf_counter()
            except (httpx.HTTPError, TimeoutError):
                await asyncio.sleep(0.1)

    def _judged(self, bodies: Sequence[Body], answers: Sequence[bytes | BaseException]) -> Row:
        return {**self._judge.judge(bodies, answers), "refused": sum(map(_is_refusal, answers))}

    async def _settle(self, cell: Cell, before: dict[str, list[int]]) -> int:
        """Waits for replicas to be as many as before. Of the processes that had to end, how many have not."""
        group = ("rank 0", "rank 1")
        doomed = [before[name][0] for name in (group if cell.process in group else (cell.process,))]
        if cell.signal == "SIGSTOP":
            doomed = []
        deadline = time.monotonic() + SETTLE_S
        counts = {name: len(pids) for name, pids in before.items()}
        while time.monotonic() < deadline:
            now = {name: len(pids) for name, pids in find_processes().items()}
            if now == counts and not any(map(is_alive, doomed)):
                break
            await asyncio.sleep(0.2)
        await self._probe()
        return sum(map(is_alive, doomed))


def _is_refusal(answer: bytes | BaseException) -> bool:
    """A 5xx whose body is an error in our form."""
    if not isinstance(answer, httpx.HTTPStatusError):
        return False
    try:
        return bool(answer.response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return False


async def _lines(client: httpx.AsyncClient, body: Body) -> AsyncGenerator[str]:
    """Of an answer of events."""
    async with client.stream("POST", "/v1/images/generations", json=body) as answer:
        async for line in answer.aiter_lines():
            yield line


def _again(before: Census, after: Census, running: Sequence[Body], num_probes: int) -> Row:
    """Encodings and steps beyond those that had to be.

    A stage that lives on has counted its work for all; one that has started since, for the new requests alone.
    """
    num_steps = sum(body["num_inference_steps"] for body in running)
    num_encoded, num_forwards = num_probes, num_probes * NUM_PROBE_STEPS
    if before.encoder.pid == after.encoder.pid:
        num_encoded += before.num_encoded + len(running)
    if before.transformer.ranks[0].pid == after.transformer.ranks[0].pid:
        num_forwards += before.num_steps + num_steps
    return {
        "encoded_again": max(0, after.num_encoded - num_encoded),
        "steps_again": max(0, after.num_steps - num_forwards),
    }


async def _census() -> Census:
    return Census(await _ask("Encoder"), await _ask("Transformer"))


async def _ask(deployment: str) -> Any:
    """A deployment's stats; asked again while it has no replica."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            try:
                return await serve.get_deployment_handle(deployment, APP_NAME).stats.remote()
            except (RayError, RayServeException):
                await asyncio.sleep(0.1)


async def _until_seated(num_requests: int) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while (await _ask("Transformer")).queue.num_seats < num_requests:
            await asyncio.sleep(0.01)


def _body(i: int) -> Body:
    """Different in all that requests of one size may differ in."""
    return {
        "prompt": f"prompt {i}",
        "seed": i,
        "num_inference_steps": NUM_STEPS + 8 * (i % NUM_REQUESTS),
        "guidance_scale": 2.0 + i % 3,
    }


def _config() -> AppConfig:
    resources = {"num_cpus": 0.1, "torch_threads": 1}
    return parse_app_config(
        {
            "model": {
                "name": "tiny",
                "checkpoint": "tiny://flux",
                "defaults": {"width": 64, "height": 64},
            },
            "encoder": resources | {"max_sequence_length": 64},
            "transformer": resources | {"shards": 2},
            "vae": resources,
            "limits": {"max_num_inference_steps": MANY_STEPS},
        }
    )


@contextmanager
def _serving(config: AppConfig) -> Iterator[str]:
    """The app on a private Ray and a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build_app(config), name=APP_NAME)
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()

"""Sends eight requests while a resource that all processes of a node share runs short: object store, disk, memory.

Each shortage has its own Ray with one tiny FLUX of two shards, served over HTTP, whose images are large enough to
go through the object store. When the shortage is over, a new request is answered, whatever happened to the others.
"""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError
from rich.progress import track

from serve_app.bench.answers import Body, Judge, is_rejection, open_client, post
from serve_app.bench.availability import AvailabilityProbe
from serve_app.bench.census import until_seated
from serve_app.bench.processes import find_processes
from serve_app.bench.report import Row, report
from serve_app.bench.tiny_app import serving, tiny_config
from serve_app.bench.whole import PlainPipeline

NUM_REQUESTS = 8
NUM_STEPS = 40
SIDE = 256
STORE_BYTES = 80 * 2**20
"""Size of the object store: about the least that Ray allows."""
BLOCK_BYTES = 8 * 2**20
LASTS_S = 10.0
APP_BYTES = 6 * 2**30
"""Memory left for the app below the threshold of Ray's memory monitor; more than the app takes."""
NEIGHBOUR = """
import sys, time
taken = []
while True:
    [kib] = [int(line.split()[1]) for line in open("/proc/meminfo") if line.startswith("MemAvailable")]
    if kib * 1024 < int(sys.argv[1]):
        break
    taken.append(bytearray(b"x" * (64 << 20)))
time.sleep(1000)
"""
"""Program that takes memory until less than a given number of bytes is available."""


@dataclass(frozen=True)
class Shortage:
    """One resource that runs short."""

    name: str
    ray: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `ray.init`."""
    environment: Mapping[str, str] = field(default_factory=dict)


def shortages() -> list[Shortage]:
    """Returns the shortages for this machine, given the memory that is available at this moment."""
    total, available = _memory("MemTotal"), _memory("MemAvailable")
    threshold = (total - available + APP_BYTES) / total
    store = {"object_store_memory": STORE_BYTES}
    return [
        Shortage("object store", store),
        Shortage("object store and disk", store, {"RAY_local_fs_capacity_threshold": "0.0001"}),
        Shortage("memory", {}, {"RAY_memory_usage_threshold": f"{threshold:.3f}"}),
    ]


def run(*, names: Sequence[str], json_file: Path | None) -> None:
    """Reports a row for each shortage.

    requests, answered, refused: counts of the eight requests; the others lost their connection.
    grey_levels: the largest difference of an image from the plain pipeline's.
    gone: number of serving processes that have ended.
    new_request_wait_s: the longest wait of a new request, from the beginning of the shortage until after its end.
    """
    judge = Judge(PlainPipeline(tiny_config()))
    rows = [_try(shortage, judge) for shortage in track(shortages(), "shortages") if shortage.name in names]
    report("shortages and their effects", rows, json_file)


def _try(shortage: Shortage, judge: Judge) -> Row:
    before = dict(os.environ)
    os.environ.update(shortage.environment)
    try:
        with serving(tiny_config(), **shortage.ray) as (url, _):
            return asyncio.run(_endure(shortage, url, judge))
    finally:
        os.environ.clear()
        os.environ.update(before)


async def _endure(shortage: Shortage, url: str, judge: Judge) -> Row:
    probe, bodies = AvailabilityProbe(url), [_body(i) for i in range(NUM_REQUESTS)]
    before = find_processes()
    async with open_client(url) as client, probe.sending():
        posts = [asyncio.create_task(post(client, body)) for body in bodies]
        await until_seated(NUM_REQUESTS // 2)
        with _memory_taken(shortage) if shortage.name == "memory" else _store_filled():
            await asyncio.sleep(LASTS_S)
        answers = await asyncio.gather(*posts, return_exceptions=True)
    now = {pid for pids in find_processes().values() for pid in pids}
    return {
        "short": shortage.name,
        **judge.judge(bodies, answers),
        "refused": sum(map(is_rejection, answers)),
        "gone": len({pid for pids in before.values() for pid in pids} - now),
        "new_request_wait_s": probe.longest_wait_s,
    }


@contextmanager
def _store_filled() -> Iterator[None]:
    """Fills the object store with objects of this process, as far as Ray accepts them."""
    objects: list[Any] = []
    deadline = time.monotonic() + LASTS_S
    while len(objects) * BLOCK_BYTES < 2 * STORE_BYTES and time.monotonic() < deadline:
        try:
            objects.append(ray.put(np.ones(BLOCK_BYTES, np.uint8)))
        except RayError:  # the store is full, and spilling is impossible
            break
    yield
    del objects


@contextmanager
def _memory_taken(shortage: Shortage) -> Iterator[None]:
    """Runs another process that takes memory until usage is a little above the threshold of Ray's monitor."""
    threshold = float(shortage.environment["RAY_memory_usage_threshold"])
    left = int(_memory("MemTotal") * (1 - threshold) - 512 * 2**20)
    neighbour = subprocess.Popen([sys.executable, "-c", NEIGHBOUR, str(left)])
    try:
        yield
    finally:
        neighbour.kill()
        neighbour.wait()


def _memory(name: str) -> int:
    """Returns a value of /proc/meminfo in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    [kib] = [int(line.split()[1]) for line in lines if line.startswith(f"{name}:")]
    return 1024 * kib


def _body(i: int) -> Body:
    return {"prompt": f"prompt {i}", "seed": i, "num_inference_steps": NUM_STEPS, "size": f"{SIDE}x{SIDE}"}

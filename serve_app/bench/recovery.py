"""kill -9 of every process that holds a part of the model, while six requests run and while none does.

Also a client that leaves: it should cost the others nothing, so its place must be free again at once. All of
it over HTTP, on one served tiny FLUX of two shards; the plain pipeline in this process knows the right pictures.
"""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from rich.progress import track

from deployments.stats import EncoderStats, TransformerStats, VaeStats
from serve_app.app import build_app
from serve_app.bench.answers import TIMEOUT_S, Body, Judge, open_client, post
from serve_app.bench.report import Row, report
from serve_app.bench.whole import PlainPipeline
from serve_app.config import APP_NAME, AppConfig, parse_app_config

NUM_REQUESTS = 6
NUM_PROBE_STEPS = 4
MANY_STEPS = 5000
"""So many that a request which is not cancelled outlasts all others."""


def run(*, victims: Sequence[str], idle_victims: Sequence[str], json_file: Path | None) -> None:
    """Rows of `killed`, `when`, `requests`, `answered`, `grey_levels`, `encoded_again`, `steps_again`,
    `left_over` and `recovery_s`, and a last one for clients that leave.

    grey_levels: the largest difference from the plain pipeline's pictures.
    left_over: processes of the lost replica that are still there; after clients have left, seats.
    recovery_s: from the kill to the answer of a request that was sent right after it; for clients that leave,
        until their seats are free.
    """
    config = _config()
    plain = PlainPipeline(config)
    cases = [(name, "busy") for name in victims] + [(name, "idle") for name in idle_victims]
    rows: list[Row] = []
    with _serving(config) as url:
        bench = Recovery(url, Judge(plain))
        for victim, when in track(cases, description="kills"):
            rows.append(asyncio.run(bench.kill(victim, when)))
        rows.append(asyncio.run(bench.leave()))
    report("kill -9 and what follows", rows, json_file)


@dataclass(frozen=True)
class Census:
    """The processes that serve, and what they have done."""

    encoder: EncoderStats
    transformer: TransformerStats
    vae: VaeStats

    @property
    def pids(self) -> dict[str, int]:
        ranks = {f"rank {rank.rank}": rank.pid for rank in self.transformer.ranks}
        return ranks | {"encoder": self.encoder.pid, "vae": self.vae.pid}

    @property
    def num_encoded(self) -> int:
        """Calls of `encode` that the encoder has answered."""
        return self.encoder.num_forwards + self.encoder.num_cache_hits

    @property
    def num_steps(self) -> int:
        """Forwards of the transformer; FLUX needs one for a step."""
        return sum(size * times for size, times in self.transformer.queue.batch_sizes.items())


class Recovery:
    """The scenarios, one after another on one app."""

    def __init__(self, url: str, judge: Judge) -> None:
        self._url, self._judge = url, judge
        self._num_probes = 0

    async def kill(self, victim: str, when: str) -> Row:
        """All requests that run have been encoded when it happens, and none is denoised."""
        running = [_body(i) for i in range(NUM_REQUESTS)] if when == "busy" else []
        probe = _body(NUM_REQUESTS + self._num_probes) | {"num_inference_steps": NUM_PROBE_STEPS}
        self._num_probes += 1
        before = await _census()
        async with open_client(self._url) as client:
            posts = [asyncio.create_task(post(client, body)) for body in running]
            await _until_seated(len(running))
            os.kill(before.pids[victim], signal.SIGKILL)
            killed_at = time.perf_counter()
            probed = asyncio.create_task(_timed(post(client, probe)))
            answers = await asyncio.gather(*posts, return_exceptions=True)
            answered_at, picture = await probed
        return {
            "killed": victim,
            "when": when,
            **self._judge.judge([*running, probe], [*answers, picture]),
            **_repeated(before, await _census(), running),
            "recovery_s": answered_at - killed_at,
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
            "killed": "client",
            "when": "busy",
            **self._judge.judge(staying, answers),
            "encoded_again": 0,
            "steps_again": 0,
            "left_over": (await _ask("Transformer")).queue.num_seats,
            "recovery_s": free_at - left_at,
        }


def _repeated(before: Census, after: Census, running: Sequence[Body]) -> Row:
    """What was done beyond the need, and by whom it should not be done any more.

    The probe comes after the kill. Of the others, a stage that lives on has counted its work for them; for one
    that has died, it is before the kill.
    """
    kept = {name for name, pid in before.pids.items() if after.pids[name] == pid}
    num_steps = sum(body["num_inference_steps"] for body in running)
    num_encoded_before = before.num_encoded + len(running) if "encoder" in kept else 0
    num_steps_before = before.num_steps + num_steps if "rank 0" in kept else 0
    return {
        "encoded_again": after.num_encoded - num_encoded_before - 1,
        "steps_again": after.num_steps - num_steps_before - NUM_PROBE_STEPS,
        "left_over": sum(_is_alive(pid) for name, pid in before.pids.items() if name not in kept),
    }


async def _census() -> Census:
    return Census(await _ask("Encoder"), await _ask("Transformer"), await _ask("Vae"))


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


async def _timed(posting: Awaitable[bytes]) -> tuple[float, bytes]:
    picture = await posting
    return time.perf_counter(), picture


def _body(i: int) -> Body:
    """Different in all that requests of one size may differ in."""
    return {
        "prompt": f"prompt {i}",
        "seed": i,
        "num_inference_steps": 60 + 8 * i,
        "guidance_scale": 2.0 + i % 3,
    }


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


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

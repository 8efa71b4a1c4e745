"""Every process that serves is killed, told to go, and stopped for a while, idle and under eight requests.

Also a request that kills whatever denoises it, and clients that leave. All of it over HTTP, on one served tiny
FLUX of two shards; the plain pipeline in this process knows the right pictures.
"""

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import ray
from ray import serve
from rich.progress import Progress

from serve_app.app import build_app
from serve_app.bench.answers import Body, Judge, is_refusal, open_client, post
from serve_app.bench.census import ask, take_census, until_idle, until_seated, work_again
from serve_app.bench.door import Door
from serve_app.bench.processes import TITLES, Leavings, find_processes, is_alive
from serve_app.bench.report import Row, report, write_rows
from serve_app.bench.whole import PlainPipeline
from serve_app.config import APP_NAME, AppConfig, parse_app_config

PROCESSES = tuple(TITLES)
WHO = (*PROCESSES, "client")
SIGNALS = ("SIGKILL", "SIGTERM", "SIGSTOP")
TWICE = ("starting", "serving")
"""Loaded, and a second time when the successor is starting, or as soon as it serves."""
WHEN = ("loaded", "idle", *TWICE)
GROUP = ("rank 0", "rank 1")
"""They end together."""
STOPPED_S = 20.0
"""From SIGSTOP to SIGCONT."""
NUM_REQUESTS = 8
NUM_STEPS = 100
MANY_STEPS = 20_000
"""So many that a request which is not cancelled outlasts all others."""
LATE_S = 1.0
"""What is told of a step so soon after the kill, was told before it."""
SETTLE_S = 120.0
"""For replicas to be as many as before, and for what was told to go to end what it has."""


@dataclass(frozen=True)
class Cell:
    """One fault."""

    process: str
    signal: str
    when: str

    @property
    def is_twice(self) -> bool:
        """Who is only stopped has no successor."""
        return self.when in TWICE and self.signal != "SIGSTOP"


QUICK = (
    Cell("rank 1", "SIGTERM", "loaded"),
    Cell("encoder", "SIGTERM", "loaded"),
    Cell("HTTP proxy", "SIGTERM", "idle"),
)


def run(*, cells: Sequence[Cell], with_killer: bool, with_leavers: bool, json_file: Path | None) -> None:
    """A row for each cell, and two more, of a request that kills and of such as their clients leave.

    requests, answered, refused: how many had been accepted, got a picture, or a 5xx in our form; the others are
        lost. grey_levels: the largest difference of a picture, new ones too, from the plain pipeline's.
    door_s: the longest that a new request waited for its picture, from the signal until all was as before; for a
        request that kills, until it was given up; for clients that leave, until their seats were free.
    start_s: how long the app took to start in this run: what door_s is to be measured by.
    encoded_again, steps_again: work done twice, as far as the processes tell that live at the end.
    left_over: processes that should have ended and have not; for clients that leave, seats. zombies: processes
        that have ended since, but were not reaped. shm_bytes: what /dev/shm holds more than before.
    """
    config = _config()
    judge = Judge(PlainPipeline(config))
    rows: list[Row] = []
    with _serving(config) as (url, start_s), Progress() as progress:
        bench = Faults(url, judge)
        others = [bench.killer()] if with_killer else []
        others += [bench.leave()] if with_leavers else []
        task = progress.add_task("faults", total=len(cells) + len(others))
        for scenario in [*(bench.fault(cell) for cell in cells), *others]:
            rows.append({**asyncio.run(scenario), "start_s": start_s})
            progress.console.print(rows[-1])
            progress.advance(task)
            if json_file is not None:
                _keep(rows[-1], json_file)
    report("faults, and what follows", rows, None)


def _keep(row: Row, json_file: Path) -> None:
    """Rows that the file has of other cells stay: all of them take an hour."""
    rows = json.loads(json_file.read_text())["rows"] if json_file.exists() else []
    others = [other for other in rows if _key(other) != _key(row)]
    write_rows(sorted([*others, row], key=_key), json_file)


def _key(row: Row) -> tuple[int, str, str]:
    return WHO.index(str(row["process"])), str(row["when"]), str(row["signal"])


class Faults:
    """The scenarios, one after another on one app."""

    def __init__(self, url: str, judge: Judge) -> None:
        self._url, self._judge = url, judge

    async def fault(self, cell: Cell) -> Row:
        """All requests that run have been encoded when it happens, and none is denoised."""
        running = [] if cell.when == "idle" else [_body(i) for i in range(NUM_REQUESTS)]
        doomed = GROUP if cell.process in GROUP else (cell.process,)
        await until_idle()
        before, processes, leavings = await take_census(), find_processes(), Leavings.now()
        door = Door(self._url)
        async with open_client(self._url) as client:
            posts = [asyncio.create_task(post(client, body)) for body in running]
            await until_seated(len(running))
            async with door.knocked_at():
                await _send(signal.Signals[cell.signal], processes[cell.process][0])
                if cell.is_twice:
                    await _send(signal.Signals[cell.signal], await self._successor(cell, processes, door))
                answers = await asyncio.gather(*posts, return_exceptions=True)
                left_over = await _settle(processes, () if cell.signal == "SIGSTOP" else doomed)
        return {
            "process": cell.process,
            "signal": cell.signal,
            "when": cell.when,
            "signals": 1 + cell.is_twice,
            **self._judged(running, answers, door),
            "door_s": door.shut_s,
            **work_again(before, await take_census(), running, door.sent),
            "left_over": left_over,
            **leavings.since(),
        }

    async def _successor(self, cell: Cell, before: Mapping[str, Sequence[int]], door: Door) -> int:
        """The process id of who takes the place of the first, when it has started, or when it serves."""
        async with asyncio.timeout(SETTLE_S):
            while not (new := set(find_processes()[cell.process]) - set(before[cell.process])):
                await asyncio.sleep(0.02)
        if cell.when == "serving":
            await _settle(before, (cell.process,))
            await door.answers_anew()
        return new.pop()

    async def killer(self) -> Row:
        """Of eight requests, each time that one is at a step the transformer's process is killed."""
        bodies = [_body(i) for i in range(NUM_REQUESTS)]
        killer, innocent = bodies[0] | {"stream": True, "progress": True}, bodies[1:]
        processes, leavings = find_processes(), Leavings.now()
        killed_at: list[float] = []
        async with open_client(self._url) as client:
            posts = [asyncio.create_task(post(client, body)) for body in innocent]
            await until_seated(len(innocent))
            began = time.perf_counter()
            async with aclosing(_lines(client, killer)) as lines:
                async for line in lines:
                    is_late = bool(killed_at) and time.perf_counter() - killed_at[-1] < LATE_S
                    if '"denoise"' in line and not is_late:
                        os.kill(find_processes()["rank 0"][0], signal.SIGKILL)
                        killed_at.append(time.perf_counter())
            given_up_s = time.perf_counter() - began
            answers = await asyncio.gather(*posts, return_exceptions=True)
        return {
            "process": "rank 0",
            "signal": "SIGKILL",
            "when": "one request runs",
            "signals": len(killed_at),
            **self._judged(innocent, answers),
            "door_s": given_up_s,
            "encoded_again": 0,
            "steps_again": 0,
            "left_over": await _settle(processes, GROUP),
            **leavings.since(),
        }

    async def leave(self) -> Row:
        """Half of the clients close their connections; the others' pictures come all the same."""
        bodies = [_body(i) for i in range(NUM_REQUESTS)]
        staying, leaving = bodies[::2], [body | {"num_inference_steps": MANY_STEPS} for body in bodies[1::2]]
        leavings = Leavings.now()
        async with open_client(self._url) as client:
            leavers = [asyncio.create_task(post(client, body)) for body in leaving]
            posts = [asyncio.create_task(post(client, body)) for body in staying]
            await until_seated(NUM_REQUESTS)
            for leaver in leavers:
                leaver.cancel()  # closes its connection
            left_at = time.perf_counter()
            while (await ask("Transformer")).queue.num_seats > len(staying):
                await asyncio.sleep(0.01)
            free_s = time.perf_counter() - left_at
            answers = await asyncio.gather(*posts)
        return {
            "process": "client",
            "signal": "leaves",
            "when": "loaded",
            "signals": len(leaving),
            **self._judged(staying, answers),
            "door_s": free_s,
            "encoded_again": 0,
            "steps_again": 0,
            "left_over": (await ask("Transformer")).queue.num_seats,
            **leavings.since(),
        }

    def _judged(
        self, bodies: Sequence[Body], answers: Sequence[bytes | BaseException], door: Door | None = None
    ) -> Row:
        row = dict(self._judge.judge(bodies, answers))
        new = [] if door is None else door.answered
        levels = self._judge.judge([body for body, _ in new], [picture for _, picture in new])["grey_levels"]
        return row | {"refused": sum(map(is_refusal, answers)), "grey_levels": max(row["grey_levels"], levels)}


async def _send(number: signal.Signals, pid: int) -> None:
    os.kill(pid, number)
    if number == signal.SIGSTOP:
        await asyncio.sleep(STOPPED_S)
        if is_alive(pid):
            os.kill(pid, signal.SIGCONT)


async def _settle(before: Mapping[str, Sequence[int]], doomed: Sequence[str]) -> int:
    """Waits until replicas are as many as before and the doomed are gone; how many of these are not."""
    pids = [pid for name in doomed for pid in before[name][:1]]
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        now = find_processes()
        if all(len(now[name]) == len(before[name]) for name in before) and not any(map(is_alive, pids)):
            break
        await asyncio.sleep(0.2)
    return sum(map(is_alive, pids))


async def _lines(client: httpx.AsyncClient, body: Body) -> AsyncGenerator[str]:
    """Of an answer of events."""
    async with client.stream("POST", "/v1/images/generations", json=body) as answer:
        async for line in answer.aiter_lines():
            yield line


def _body(i: int) -> Body:
    """Different in all that requests of one size may differ in."""
    return {
        "prompt": f"prompt {i}",
        "seed": i,
        "num_inference_steps": NUM_STEPS + 8 * i,
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
def _serving(config: AppConfig) -> Iterator[tuple[str, float]]:
    """The app on a private Ray and a free port; the seconds that its replicas took to start, all at once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        began = time.perf_counter()
        serve.run(build_app(config), name=APP_NAME)
        yield f"http://127.0.0.1:{port}", time.perf_counter() - began
    finally:
        serve.shutdown()
        ray.shutdown()

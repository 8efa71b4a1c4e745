"""Kills, terminates and temporarily stops every serving process, idle and under eight requests.

Also tries a request that kills the process that denoises it, and clients that disconnect. All requests go over
HTTP to one served tiny FLUX of two shards; the plain pipeline in this process makes the reference images.
"""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import httpx

from serve_app.bench.answers import Body, Judge, is_rejection, open_client, post
from serve_app.bench.availability import AvailabilityProbe
from serve_app.bench.census import ask, recomputed_work, snapshot_stats, until_idle, until_seated
from serve_app.bench.processes import TITLES, LeakedResources, find_processes, is_alive
from serve_app.bench.progress import Progress
from serve_app.bench.report import Row, report, write_rows
from serve_app.bench.tiny_app import MANY_STEPS, serving, tiny_config
from serve_app.bench.whole import PlainPipeline

PROCESSES = tuple(TITLES)
TARGETS = (*PROCESSES, "client")
SIGNALS = ("SIGKILL", "SIGTERM", "SIGSTOP")
REPEATED_FAULTS = ("starting", "serving")
"""The fault happens under load, and again when the successor is starting, or as soon as it serves."""
WHEN = ("loaded", "idle", *REPEATED_FAULTS)
GROUP = ("rank 0", "rank 1")
"""Processes that end together."""
STOPPED_S = 20.0
"""Time from SIGSTOP to SIGCONT."""
NUM_REQUESTS = 8
NUM_STEPS = 100
LATE_S = 1.0
"""A progress event that arrives this soon after a kill was sent before it."""
SETTLE_S = 120.0
"""Longest wait until there are as many replicas as before, and terminated processes have finished their work."""


@dataclass(frozen=True)
class FaultCase:
    """One fault: which process gets which signal, and when."""

    process: str
    signal: str
    when: str

    @property
    def is_twice(self) -> bool:
        """Whether the successor gets the signal, too. A process that is only stopped has no successor."""
        return self.when in REPEATED_FAULTS and self.signal != "SIGSTOP"


QUICK = (
    FaultCase("rank 1", "SIGTERM", "loaded"),
    FaultCase("encoder", "SIGTERM", "loaded"),
    FaultCase("HTTP proxy", "SIGTERM", "idle"),
)


def run(*, cells: Sequence[FaultCase], with_killer: bool, with_leavers: bool, json_file: Path | None) -> None:
    """Reports a row for each cell, one for a request that kills processes, and one for clients that disconnect.

    requests, answered, refused: how many were accepted, got an image, or got a 5xx in relay's error format; the
        others are lost. grey_levels: the largest difference of an image from the plain pipeline's, including those
        of new requests.
    new_request_wait_s: the longest wait of a new request for its image, from the signal until all was as before;
        for a request that kills, the time until it was given up; for clients that disconnect, until their seats
        were free.
    start_s: how long the app took to start in this run, as a measure for new_request_wait_s.
    encoded_again, steps_again: work done twice, as far as the processes that live at the end have counted it.
    left_over: processes that should have ended and have not; for clients that disconnect, seats. zombies:
        processes that have ended since, but were not reaped. shm_bytes: growth of /dev/shm.
    """
    config = tiny_config()
    judge = Judge(PlainPipeline(config))
    rows: list[Row] = []
    with serving(config) as (url, start_s), Progress() as progress:
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
    report("faults and their effects", rows, None)


def _keep(row: Row, json_file: Path) -> None:
    """Writes the row into the file, and keeps those of other cells there: running all of them takes an hour."""
    rows = json.loads(json_file.read_text())["rows"] if json_file.exists() else []
    others = [other for other in rows if _key(other) != _key(row)]
    write_rows(sorted([*others, row], key=_key), json_file)


def _key(row: Row) -> tuple[int, str, str]:
    return TARGETS.index(str(row["process"])), str(row["when"]), str(row["signal"])


class Faults:
    """Runs the scenarios one after another on one app."""

    def __init__(self, url: str, judge: Judge) -> None:
        self._url, self._judge = url, judge

    async def fault(self, cell: FaultCase) -> Row:
        """Injects one fault. By then all running requests are encoded, and none is fully denoised."""
        running = [] if cell.when == "idle" else [_body(i) for i in range(NUM_REQUESTS)]
        doomed = GROUP if cell.process in GROUP else (cell.process,)
        await until_idle()
        before, processes, leavings = await snapshot_stats(), find_processes(), LeakedResources.now()
        probe = AvailabilityProbe(self._url)
        async with open_client(self._url) as client:
            posts = [asyncio.create_task(post(client, body)) for body in running]
            await until_seated(len(running))
            async with probe.sending():
                await _send(signal.Signals[cell.signal], processes[cell.process][0])
                if cell.is_twice:
                    await _send(signal.Signals[cell.signal], await self._successor(cell, processes, probe))
                answers = await asyncio.gather(*posts, return_exceptions=True)
                left_over = await _settle(processes, () if cell.signal == "SIGSTOP" else doomed)
        return {
            "process": cell.process,
            "signal": cell.signal,
            "when": cell.when,
            "signals": 1 + cell.is_twice,
            **self._judged(running, answers, probe),
            "new_request_wait_s": probe.longest_wait_s,
            **recomputed_work(before, await snapshot_stats(), running, probe.sent),
            "left_over": left_over,
            **leavings.since(),
        }

    async def _successor(
        self, cell: FaultCase, before: Mapping[str, Sequence[int]], probe: AvailabilityProbe
    ) -> int:
        """Returns the process ID of the successor, once it has started or once it serves."""
        async with asyncio.timeout(SETTLE_S):
            while not (new := set(find_processes()[cell.process]) - set(before[cell.process])):
                await asyncio.sleep(0.02)
        if cell.when == "serving":
            await _settle(before, (cell.process,))
            await probe.wait_for_new_answer()
        return new.pop()

    async def killer(self) -> Row:
        """Kills rank 0 each time that one certain request of the eight reports a step."""
        bodies = [_body(i) for i in range(NUM_REQUESTS)]
        killer, innocent = bodies[0] | {"stream": True, "progress": True}, bodies[1:]
        processes, leavings = find_processes(), LeakedResources.now()
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
            "new_request_wait_s": given_up_s,
            "encoded_again": 0,
            "steps_again": 0,
            "left_over": await _settle(processes, GROUP),
            **leavings.since(),
        }

    async def leave(self) -> Row:
        """Half of the clients close their connections; the others still get their images."""
        bodies = [_body(i) for i in range(NUM_REQUESTS)]
        staying, leaving = bodies[::2], [body | {"num_inference_steps": MANY_STEPS} for body in bodies[1::2]]
        leavings = LeakedResources.now()
        async with open_client(self._url) as client:
            leavers = [asyncio.create_task(post(client, body)) for body in leaving]
            posts = [asyncio.create_task(post(client, body)) for body in staying]
            await until_seated(NUM_REQUESTS)
            for leaver in leavers:
                leaver.cancel()  # closes the connection
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
            "new_request_wait_s": free_s,
            "encoded_again": 0,
            "steps_again": 0,
            "left_over": (await ask("Transformer")).queue.num_seats,
            **leavings.since(),
        }

    def _judged(
        self,
        bodies: Sequence[Body],
        answers: Sequence[bytes | BaseException],
        probe: AvailabilityProbe | None = None,
    ) -> Row:
        row = dict(self._judge.judge(bodies, answers))
        new = [] if probe is None else probe.answered
        levels = self._judge.judge([body for body, _ in new], [picture for _, picture in new])["grey_levels"]
        return row | {"refused": sum(map(is_rejection, answers)), "grey_levels": max(row["grey_levels"], levels)}


async def _send(number: signal.Signals, pid: int) -> None:
    os.kill(pid, number)
    if number == signal.SIGSTOP:
        await asyncio.sleep(STOPPED_S)
        if is_alive(pid):
            os.kill(pid, signal.SIGCONT)


async def _settle(before: Mapping[str, Sequence[int]], doomed: Sequence[str]) -> int:
    """Waits until there are as many replicas as before and the doomed processes are gone.

    Returns how many of the doomed are still alive after SETTLE_S.
    """
    pids = [pid for name in doomed for pid in before[name][:1]]
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        now = find_processes()
        if all(len(now[name]) == len(before[name]) for name in before) and not any(map(is_alive, pids)):
            break
        await asyncio.sleep(0.2)
    return sum(map(is_alive, pids))


async def _lines(client: httpx.AsyncClient, body: Body) -> AsyncGenerator[str]:
    """Yields the lines of an event stream."""
    async with client.stream("POST", "/v1/images/generations", json=body) as answer:
        async for line in answer.aiter_lines():
            yield line


def _body(i: int) -> Body:
    """Returns a body that differs from the others in everything in which requests of one size may differ."""
    return {
        "prompt": f"prompt {i}",
        "seed": i,
        "num_inference_steps": NUM_STEPS + 8 * i,
        "guidance_scale": 2.0 + i % 3,
    }

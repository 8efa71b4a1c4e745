"""Compares plain diffusers, replicas of the whole pipeline, and relay, on the same images: rates and latencies.

All use the same checkpoint on the same cores, or GPUs. They take turns, there and back (A B C, C B A), so that
drift of the machine's speed affects all alike. Each is started for its turn and ended after it: a GPU would not
hold them all, and idle Serve processes take 2 to 4 % of a core each.
"""

import io
import json
import os
import statistics
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from cluster.machines import accelerator
from cluster.machines.machine import describe_machine
from serve_app.bench.contenders import OURS, PLAIN, Contender, Draw, Site, build_contenders
from serve_app.bench.load.figures import percentile
from serve_app.bench.models import bench_model
from serve_app.bench.progress import Progress
from serve_app.bench.report import Row, print_rows
from serve_app.bench.whole import Fields
from serve_app.commands.local import private_serve
from serve_app.commands.port import find_port_fault
from serve_app.config.app import ConfigError

console = Console(stderr=True)


@dataclass(frozen=True)
class Cell:
    """One comparison: images of one size, for `concurrency` clients that each wait for their image."""

    size: str
    concurrency: int
    num_requests: int
    """Requests per way and turn."""

    def bodies(self, turn: int, steps: int | None) -> list[Fields]:
        """Returns the bodies of one turn, the same for each way, with new prompts. turn: from 0; -1: warm-up."""
        more = {} if steps is None else {"num_inference_steps": steps}
        seeds = [zlib.crc32(f"{self} {turn} {i}".encode()) for i in range(self.num_requests)]
        return [{"prompt": f"{seed:08x}", "seed": seed, "size": self.size} | more for seed in seeds]


@dataclass
class Record:
    """The results of one way in one cell."""

    elapsed_s: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    pictures: list[bytes] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return len(self.latencies_s) / self.elapsed_s


Records = Mapping[Cell, Mapping[str, Record]]


def run(
    *,
    model: str,
    sizes: Sequence[str],
    concurrencies: Sequence[int],
    num_steps: int | None,
    num_requests: int,
    num_rounds: int,
    num_cores: int | None,
    names: Sequence[str],
    port: int,
    json_file: Path | None,
) -> None:
    """Reports rows of `size`, `concurrency`, `way`, `pictures_per_s`, `p50_s`, `p95_s`, ratios and `grey_levels`.

    `rate_ratio` is relay's rate over this way's, `p95_ratio` this way's p95 over relay's: above 1, relay is
    better. `grey_levels` is the largest difference of a pixel from plain diffusers'.

    Args:
        model: a name or checkpoint for bench_model.
        num_requests: the least number per way and turn; each client sends at least one.
        num_rounds: each is two turns, there and back.
        names: of contenders; empty: all.
    """
    cells = [Cell(size, clients, max(num_requests, clients)) for clients in concurrencies for size in sizes]
    cores = sorted(os.sched_getaffinity(0))[:num_cores]
    os.sched_setaffinity(0, cores)  # child processes inherit it
    if fault := find_port_fault("127.0.0.1", port):
        raise ConfigError(fault.replace("http_options.port", "--port"))
    with tempfile.TemporaryDirectory() as folder, private_serve(http_port=port), Progress() as progress:
        site = Site(
            model=bench_model(model, Path(folder)),
            num_cores=len(cores),
            num_gpus=len(accelerator.device_names()),
            url=f"http://127.0.0.1:{port}",
            max_sequence_length=16 if model in ("tiny", "100M") else None,
        )
        contenders = _wanted(build_contenders(site), names)
        absent = {name: fault for name, each in contenders.items() if (fault := each.find_fault(site))}
        present = {name: each for name, each in contenders.items() if name not in absent}
        records = compete(site, present, cells, num_steps, num_rounds, progress)
    rows = {cell: compare(of) for cell, of in records.items()}
    _show(rows, absent, model, site.num_copies)
    if json_file is not None:
        document: dict[str, Any] = {"machine": describe_machine(), "model": model, "steps": num_steps}
        document |= {"cores": len(cores), "N": site.num_copies, "left_out": absent}
        document["rows"] = _flat(rows)
        json_file.write_text(json.dumps(document, indent=1) + "\n")


def _flat(rows: Mapping[Cell, Sequence[Row]]) -> list[dict[str, Any]]:
    return [
        {"size": cell.size, "concurrency": cell.concurrency} | dict(row)
        for cell, each in rows.items()
        for row in each
    ]


def _show(rows: Mapping[Cell, Sequence[Row]], absent: Mapping[str, str], model: str, num_copies: int) -> None:
    for cell, each in rows.items():
        title = f"{model}, {cell.size}, {cell.concurrency} at once, N = {num_copies}"
        print_rows(f"{title}; a ratio above 1 means that ours is better", each)
    for name, fault in absent.items():
        console.print(f"left out: {name} {fault}", style="yellow")


def _wanted(contenders: Mapping[str, Contender], names: Sequence[str]) -> dict[str, Contender]:
    if unknown := set(names) - set(contenders):
        raise ConfigError(f"--ways {', '.join(sorted(unknown))}: unknown; choose from: {'; '.join(contenders)}")
    return {name: each for name, each in contenders.items() if not names or name in (*names, OURS, PLAIN)}


def compete(
    site: Site,
    contenders: Mapping[str, Contender],
    cells: Sequence[Cell],
    num_steps: int | None,
    num_rounds: int,
    progress: Progress,
) -> Records:
    """Runs each way's turns in every cell. All ways get the same requests."""
    records: Records = {cell: defaultdict(Record) for cell in cells}
    task = progress.add_task("start", total=2 * num_rounds * len(contenders) * len(cells))
    orders = [list(contenders), list(contenders)[::-1]] * num_rounds
    for turn, order in enumerate(orders):
        for name in order:
            progress.update(task, description=f"{name}: start")
            with contenders[name].start(site) as draw:
                for cell in cells:
                    progress.update(task, description=f"{name}, {cell.size}, {cell.concurrency} at once")
                    _ask(draw, cell, cell.bodies(-1, num_steps)[: cell.concurrency])  # warm-up
                    _take_turn(draw, cell, records[cell][name], turn, num_steps)
                    progress.advance(task)
    return records


def _take_turn(draw: Draw, cell: Cell, record: Record, turn: int, num_steps: int | None) -> None:
    began = time.perf_counter()
    asked = _ask(draw, cell, cell.bodies(turn, num_steps))
    record.elapsed_s += time.perf_counter() - began
    record.latencies_s += [latency_s for latency_s, _ in asked]
    record.pictures += [picture for _, picture in asked]


def _ask(draw: Draw, cell: Cell, bodies: Sequence[Fields]) -> list[tuple[float, bytes]]:
    """Returns seconds and image of each request, sent by clients that each wait for one answer before the next."""

    def one(body: Fields) -> tuple[float, bytes]:
        began = time.perf_counter()
        picture = draw(body)
        return time.perf_counter() - began, picture

    with ThreadPoolExecutor(cell.concurrency) as clients:
        return list(clients.map(one, bodies))


def compare(records: Mapping[str, Record]) -> list[Row]:
    """Returns a row for each way in one cell."""
    ours, plain = records[OURS], records[PLAIN]
    return [
        {
            "way": name,
            "pictures_per_s": record.rate,
            "p50_s": statistics.median(record.latencies_s),
            "p95_s": percentile(record.latencies_s, 95),
            "rate_ratio": ours.rate / record.rate,
            "p95_ratio": percentile(record.latencies_s, 95) / percentile(ours.latencies_s, 95),
            "grey_levels": max(map(grey_levels, record.pictures, plain.pictures)),
        }
        for name, record in records.items()
    ]


def grey_levels(one: bytes, other: bytes) -> int:
    """Returns the largest difference of a pixel between two images."""
    pixels = [np.asarray(Image.open(io.BytesIO(data))).astype(int) for data in (one, other)]
    return int(np.abs(pixels[0] - pixels[1]).max())

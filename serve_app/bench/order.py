"""Measures the effect of the transformer's queue order: short requests among long ones, one client beside many.

Two transformers in this process, whose configs differ in `order` only, take turns in every round, so that drift of
the machine's speed affects both alike. Requests are sent at set times, whether or not earlier ones have ended.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from deployments.answers import Conditioning
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.options.qos import OrderName, Qos
from deployments.request import GenerationRequest
from deployments.stages import load_stage
from deployments.transformer import Transformer
from serve_app.bench.models import bench_model, bench_request
from serve_app.bench.progress import Progress
from serve_app.bench.report import Row, report

NUM_TEXT_TOKENS = 16


@dataclass(frozen=True)
class Client:
    """A client that sends its requests evenly over a part (`spread`) of the time that the crowd takes alone."""

    share: str
    num_requests: int
    num_steps: int
    spread: float = 0.0


@dataclass(frozen=True)
class Load:
    """Two clients at once: the measured one, and a crowd that competes with it."""

    name: str
    crowd: Client
    measured: Client


def loads(*, num_long: int, num_measured: int) -> tuple[Load, ...]:
    """Returns the loads. The measured requests are sent while the crowd's are running."""
    return (
        Load("short among long", Client("a", num_long, 28), Client("a", num_measured, 4, spread=0.7)),
        Load(
            "one beside 50 x as many", Client("a", 50 * num_measured, 8), Client("b", num_measured, 8, spread=0.7)
        ),
    )


def run(*, model: str, num_long: int, num_measured: int, num_rounds: int, json_file: Path | None) -> None:
    """Reports rows of `load`, `order`, `solo_p95_s` (of the measured client alone), `p95_s`, `over_solo`, `sooner`
    (how many times as fast as with fifo), and the crowd's `crowd_p95_s`."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        rig = Rig(bench_model(model, Path(folder)))
        for load in loads(num_long=num_long, num_measured=num_measured):
            task = progress.add_task(load.name, total=num_rounds * len(rig.orders))
            rounds: dict[OrderName, list[Times]] = {order: [] for order in rig.orders}
            for _ in range(num_rounds):
                for order, done in rounds.items():
                    done.append(asyncio.run(rig.play(order, load)))
                    progress.advance(task)
            rows += _rows(load, rounds)
    report("which requests go first", rows, json_file)


@dataclass(frozen=True)
class Times:
    """Seconds of every request, from sending it to its latents."""

    solo: list[float]
    measured: list[float]
    crowd: list[float]


class Rig:
    """One transformer for each order."""

    def __init__(self, model: ModelConfig) -> None:
        self._request = bench_request(model, 1)
        encoding = load_stage("encode", model, EncoderConfig(max_sequence_length=NUM_TEXT_TOKENS))
        self._conditioning = Conditioning(encoding.encode(self._request), 0.0)
        orders: Sequence[OrderName] = get_args(OrderName)
        self.orders = {order: Transformer(model, TransformerConfig(order=order)) for order in orders}

    async def play(self, order: OrderName, load: Load) -> Times:
        """Runs one round of the load with one order."""
        transformer = self.orders[order]
        await self._send(transformer, replace(load.measured, num_requests=2), 0.0)  # so that its kind is known
        alone = replace(load.measured, spread=0.0, num_requests=1)
        solo = [time for _ in range(8) for time in await self._send(transformer, alone, 0.0)]
        start = time.perf_counter()
        await self._send(transformer, load.crowd, 0.0)
        crowd_s = time.perf_counter() - start
        crowd, measured = await asyncio.gather(
            self._send(transformer, load.crowd, 0.0), self._send(transformer, load.measured, crowd_s)
        )
        return Times(solo, measured, crowd)

    async def _send(self, transformer: Transformer, client: Client, crowd_s: float) -> list[float]:
        gap_s = crowd_s * client.spread / client.num_requests
        request = replace(self._request, num_inference_steps=client.num_steps)
        asked = (self._ask(transformer, request, client.share, i * gap_s) for i in range(client.num_requests))
        return list(await asyncio.gather(*asked))

    async def _ask(self, transformer: Transformer, request: GenerationRequest, share: str, at_s: float) -> float:
        await asyncio.sleep(at_s)
        start = time.perf_counter()
        given: Mapping[str, Any] = {"qos": Qos(share=share)}
        async for _ in transformer.denoise(self._conditioning, request, **given):
            pass
        return time.perf_counter() - start


def _rows(load: Load, rounds: Mapping[OrderName, Sequence[Times]]) -> list[Row]:
    p95s = {
        order: {
            what: _p95([t for done in of for t in getattr(done, what)]) for what in ("solo", "measured", "crowd")
        }
        for order, of in rounds.items()
    }
    return [
        {
            "load": load.name,
            "order": order,
            "solo_p95_s": p95["solo"],
            "p95_s": p95["measured"],
            "over_solo": p95["measured"] / p95["solo"],
            "sooner": p95s["fifo"]["measured"] / p95["measured"],
            "crowd_p95_s": p95["crowd"],
        }
        for order, p95 in p95s.items()
    ]


def _p95(times: Sequence[float]) -> float:
    return statistics.quantiles(times, n=20, method="inclusive")[-1]

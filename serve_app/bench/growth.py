"""Varies the HTTP load on an app that may use all of three nodes, which have three GPUs each in name only.

The first model's denoiser has two shards, and its requests use different adapters. The second model is scaled to
zero, and is requested when the first has taken all GPUs. The plain pipeline here makes the reference images.
"""

import asyncio
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from cluster.machines.nodes import cluster_nodes
from deployments.config.model import ModelConfig
from serve_app.bench.adapters import write_adapter
from serve_app.bench.answers import TIMEOUT_S, Body, Judge, open_client, post
from serve_app.bench.nodes import WORKER, cluster_of, replicas, serving
from serve_app.bench.report import Row, report
from serve_app.bench.whole import PlainPipeline
from serve_app.config.app import AppConfig
from serve_app.config.serve_file import parse_app_config

NODE = WORKER | {"num_gpus": 3}
NUM_NODES = 3
NUM_CLIENTS = 32
NUM_ADAPTERS = 3
STAGES = ("Encoder", "Transformer", "Vae")
BUSY, SLEEPER = "busy", "sleeper"
Answers = list[bytes | BaseException]


def run(*, json_file: Path | None) -> None:
    """Reports rows of `event`, `requests`, `answered`, `grey_levels`, `encoders`, `groups`, `vaes`, `nodes`,
    `waiting` and `seconds`.

    encoders, groups, vaes, nodes: the busy model's replicas of each stage at the event's end, and the number of
    nodes that its shard groups are on. waiting: replicas that are still starting. seconds: until the cluster had
    the expected shape.
    """
    with tempfile.TemporaryDirectory() as folder:
        adapters = _write_adapters(Path(folder))
        judge = Judge(AdaptedPipeline(parse_app_config(_model(BUSY, adapters)), adapters))
        config = parse_app_config({"models": [_model(BUSY, adapters), _sleeping()]})
        with cluster_of(*[NODE] * NUM_NODES) as cluster, serving(config) as url:
            rows = asyncio.run(Growth(cluster, url, judge).run())
    report("an app that grows to the whole cluster", rows, json_file)


class AdaptedPipeline(PlainPipeline):
    """The plain pipeline with adapters, which diffusers' own loader loads."""

    def __init__(self, config: AppConfig, adapters: dict[str, str]) -> None:
        super().__init__(config)
        for name, file in adapters.items():
            self._pipe.load_lora_weights(file, adapter_name=name)

    def draw(self, **fields: Any) -> bytes:
        fields.pop("model")
        names = [each["name"] for each in fields.get("lora", ())]
        self._pipe.enable_lora() if names else self._pipe.disable_lora()
        if names:
            self._pipe.set_adapters(names)
        return super().draw(**fields)


class Growth:
    """Runs the events one after another on one app."""

    def __init__(self, cluster: Cluster, url: str, judge: Judge) -> None:
        self._cluster, self._url, self._judge = cluster, url, judge

    async def run(self) -> list[Row]:
        rows = []
        async with self._load(1) as (bodies, answers):
            await self._until(lambda: len(answers) == 3)
        rows.append(self._row("one client", bodies, answers, 0.0))
        async with self._load(NUM_CLIENTS) as (bodies, answers):
            rows.append(await self._rise(bodies, answers))
            rows.append(await self._wake())
            rows.append(await self._die(bodies, answers))
        rows.append(self._row("all answered", bodies, answers, 0.0))
        rows.append(await self._return())
        return rows

    async def _rise(self, bodies: list[Body], answers: Answers) -> Row:
        """32 clients: shard groups are added until no node has room for another."""
        start = time.perf_counter()
        await self._until(lambda: len(_running(BUSY, "Transformer")) >= 3 and not _coming())
        return self._row("32 clients", list(bodies[: len(answers)]), list(answers), time.perf_counter() - start)

    async def _wake(self) -> Row:
        """The other model wakes, for which the busy one must give up room."""
        start = time.perf_counter()
        body = _body(NUM_ADAPTERS) | {"model": SLEEPER}  # without an adapter
        async with open_client(self._url) as client:
            answer = await post(client, body)
        return self._row("the other wakes", [body], [answer], time.perf_counter() - start)

    async def _die(self, bodies: list[Body], answers: Answers) -> Row:
        """A node with shard groups dies at peak load."""
        nodes = Counter(replica["node_id"] for replica in _running(BUSY, "Transformer"))
        kept = {replica["node_id"] for stage in ("Encoder", "Vae") for replica in _running(BUSY, stage)}
        [victim, *_] = [node for node in self._cluster.worker_nodes if node.node_id in nodes.keys() - kept]
        self._cluster.remove_node(victim, allow_graceful=False)
        start, before = time.perf_counter(), len(answers)
        await self._until(lambda: len(_nodes()) == NUM_NODES)  # the head included
        await self._until(lambda: len(answers) > before + NUM_CLIENTS and not _coming())
        return self._row("a node dies", list(bodies[: len(answers)]), list(answers), time.perf_counter() - start)

    async def _return(self) -> Row:
        """One client again: one replica of each stage is left, and no request was cut off."""
        start = time.perf_counter()
        async with self._load(1) as (bodies, answers):
            await self._until(
                lambda: (
                    all(len(_running(BUSY, stage)) == 1 for stage in STAGES)
                    and not replicas(f"Transformer_{BUSY}", "STOPPING", "STARTING")
                )
            )
        return self._row("one client again", bodies, answers, time.perf_counter() - start)

    @asynccontextmanager
    async def _load(self, num_clients: int) -> AsyncIterator[tuple[list[Body], Answers]]:
        """Runs num_clients clients that each send one request after another, and waits for their last ones."""
        bodies: list[Body] = []
        answers: Answers = []
        stop = asyncio.Event()

        async def ask_on(client: Any, i: int) -> None:
            while not stop.is_set():
                body = _body(i) | {"model": BUSY}
                [answer] = await asyncio.gather(post(client, body), return_exceptions=True)
                bodies.append(body)
                answers.append(answer)

        async with open_client(self._url) as client:
            clients = [asyncio.create_task(ask_on(client, i)) for i in range(num_clients)]
            yield bodies, answers
            stop.set()
            await asyncio.gather(*clients)

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                await asyncio.sleep(0.2)

    def _row(self, event: str, bodies: list[Body], answers: Answers, seconds: float) -> Row:
        counts = {stage: len(_running(BUSY, stage)) for stage in STAGES}
        return {
            "event": event,
            **self._judge.judge(bodies, answers),
            "encoders": counts["Encoder"],
            "groups": counts["Transformer"],
            "vaes": counts["Vae"],
            "nodes": len({replica["node_id"] for replica in _running(BUSY, "Transformer")}),
            "waiting": len(_coming()),
            "seconds": seconds,
        }


def _running(model: str, stage: str) -> list[dict[str, Any]]:
    return replicas(f"{stage}_{model}", "RUNNING")


def _coming() -> list[dict[str, Any]]:
    return [
        each for stage in STAGES for model in (BUSY, SLEEPER) for each in replicas(f"{stage}_{model}", "STARTING")
    ]


def _nodes() -> tuple[Any, ...]:
    return cluster_nodes()


def _body(i: int) -> Body:
    adapter = i % (NUM_ADAPTERS + 1)
    lora = [{"name": f"adapter-{adapter}"}] if adapter < NUM_ADAPTERS else []
    return {"prompt": f"prompt {i % 4}", "seed": i % 4, "num_inference_steps": 40, "lora": lora}


def _write_adapters(folder: Path) -> dict[str, str]:
    model = ModelConfig(name="tiny", checkpoint="tiny://flux", family="flux")
    return {f"adapter-{seed}": str(write_adapter(model, folder, seed)) for seed in range(NUM_ADAPTERS)}


def _model(name: str, adapters: dict[str, str]) -> dict[str, Any]:
    here: dict[str, Any] = {
        "num_cpus": 0.02,
        "torch_threads": 1,
        "labels": {"has": "gpus"},
        "upscale_delay_s": 1.0,
        "downscale_delay_s": 5.0,
    }
    sources = {key: {"source": file} for key, file in adapters.items()}
    return {
        "model": {"name": name, "checkpoint": "tiny://flux", "defaults": {"width": 64, "height": 64}}
        | ({"adapters": sources} if sources else {}),
        "encoder": here | {"num_gpus": 0.25, "max_sequence_length": 64},
        "transformer": here | {"num_gpus": 1, "shards": 2, "max_batch_size": 1},
        "vae": here | {"num_gpus": 0.25},
    }


def _sleeping() -> dict[str, Any]:
    """Returns the second model's config: unsharded, on one GPU, and scaled to zero when idle."""
    model = _model(SLEEPER, {})
    model["transformer"] |= {"shards": 1}
    return {
        key: stage if key == "model" else stage | {"min_replicas": 0, "downscale_delay_s": 600.0}
        for key, stage in model.items()
    }

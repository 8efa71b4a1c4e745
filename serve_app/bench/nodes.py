"""Varies load and nodes of a Ray cluster with several nodes on this machine, which have GPUs in name only.

The head runs the ingress. Two small workers have room for one shard each of a group of two; a large worker that
joins has room for both. The plain pipeline in this process makes the reference images.
"""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client
from ray.util.placement_group import placement_group_table

from deployments.request import GenerationRequest
from serve_app.app import build_app, build_validator
from serve_app.bench.answers import TIMEOUT_S, Body, Judge, open_client, post
from serve_app.bench.report import Row, report
from serve_app.bench.whole import PlainPipeline
from serve_app.config.app import AppConfig
from serve_app.config.serve_file import APP_NAME, parse_app_config

HEAD = {"num_cpus": 1, "object_store_memory": 2**27}
WORKER = HEAD | {"labels": {"has": "gpus"}}
SMALL, LARGE = WORKER | {"num_gpus": 1}, WORKER | {"num_gpus": 2}
NUM_CLIENTS = 16
NUM_REQUESTS = 12
"""Requests in progress when their node dies."""
DRAIN_STEPS = 500
"""Enough steps that downscaling stops a replica long before its request is done."""


def run(*, json_file: Path | None) -> None:
    """Reports rows of `event`, `requests`, `answered`, `grey_levels`, `encoders`, `groups` and `seconds`.

    encoders: the largest number of encoder replicas so far. groups: number of nodes of each shard group, at the
    end. seconds: from the event until the cluster had the expected shape, or until all requests were answered.
    """
    config = _config()
    judge = Judge(PlainPipeline(config))
    with cluster_of(SMALL, SMALL) as cluster, serving(config) as url:
        bench = Nodes(cluster, url, config, judge)
        rows = asyncio.run(bench.run())
    report("nodes and load that come and go", rows, json_file)


class Nodes:
    """Runs the events one after another on one app."""

    def __init__(self, cluster: Cluster, url: str, config: AppConfig, judge: Judge) -> None:
        self._cluster, self._url, self._judge = cluster, url, judge
        self._validator = build_validator(config)
        self._most_encoders = 0

    async def run(self) -> list[Row]:
        events = (self._begin, self._rise_and_join, self._fall, self._wake, self._die)
        return [await event() for event in events]

    async def _begin(self) -> Row:
        """One client. No node has room for a whole shard group, so the replica warns that its group is spread."""
        start = time.perf_counter()
        async with self._load(1) as (bodies, answers):
            await self._until(lambda: len(answers) == 3)
        [replica] = replicas("Transformer", "RUNNING", "STARTING")
        logs = Path(self._cluster.head_node.get_logs_dir_path())
        log = (logs / replica["log_file_path"].lstrip("/")).read_text()
        assert "they lie on 2" in log, f"no warning in {log}"
        return self._row("one client", bodies, answers, time.perf_counter() - start)

    async def _rise_and_join(self) -> Row:
        """16 clients: a second shard group is wanted, but finds room only on a node that joins."""
        async with self._load(NUM_CLIENTS) as (bodies, answers):
            await self._until(lambda: bool(replicas("Transformer", "STARTING")))
            node, joined = self._cluster.add_node(**LARGE), time.perf_counter()
            await self._until(lambda: len(replicas("Transformer", "RUNNING")) == 2)
            seconds = time.perf_counter() - joined
            assert node.node_id in {replica["node_id"] for replica in replicas("Transformer", "RUNNING")}
        return self._row("node joins under load", bodies, answers, seconds)

    async def _fall(self) -> Row:
        """Two requests, one on each shard group. One group is scaled down, but works on until its request is done.

        The requests bypass the ingress and so its retries: a request that is cut off here is lost.
        """
        fields = {"prompt": "the last one out", "seed": 0, "num_inference_steps": DRAIN_STEPS}
        [request] = self._validator.requests(fields)
        start = time.perf_counter()
        latents = [asyncio.create_task(_denoise(request)) for _ in range(2)]
        await self._until(lambda: len(replicas("Transformer", "RUNNING")) == 1)
        assert replicas("Transformer", "STOPPING"), "the other shard group should be draining"
        draining = not any(task.done() for task in latents)
        answers = await asyncio.gather(*latents, return_exceptions=True)
        await self._until(lambda: not replicas("Transformer", "STOPPING"))
        assert draining, "a request was done before a shard group was released"
        return {
            "event": "load falls",
            "requests": len(answers),
            "answered": sum(not isinstance(answer, BaseException) for answer in answers),
            "grey_levels": 0,
            **self._shape(),
            "seconds": time.perf_counter() - start,
        }

    async def _wake(self) -> Row:
        """The VAE was idle and has scaled to zero; a request wakes it."""
        await self._until(lambda: not replicas("Vae", "STARTING", "RUNNING", "STOPPING"))
        start = time.perf_counter()
        async with open_client(self._url) as client:
            answer = await post(client, _body(0))
        return self._row("sleeping stage wakes", [_body(0)], [answer], time.perf_counter() - start)

    async def _die(self) -> Row:
        """The node of the only shard group dies when the shortest of 12 requests has been answered."""
        bodies = [_body(i) for i in range(NUM_REQUESTS)]
        async with open_client(self._url) as client:
            posts = [asyncio.create_task(post(client, body)) for body in bodies]
            await asyncio.wait(posts, return_when=asyncio.FIRST_COMPLETED)
            [replica] = replicas("Transformer", "RUNNING")
            [node] = [node for node in self._cluster.worker_nodes if node.node_id == replica["node_id"]]
            num_answered = sum(task.done() for task in posts)
            self._cluster.remove_node(node, allow_graceful=False)
            died = time.perf_counter()
            answers = await asyncio.gather(*posts, return_exceptions=True)
        assert num_answered < NUM_REQUESTS / 2, f"{num_answered} requests were already answered when the node died"
        return self._row("node dies", bodies, answers, time.perf_counter() - died)

    @asynccontextmanager
    async def _load(self, num_clients: int) -> AsyncIterator[tuple[list[Body], list[bytes | BaseException]]]:
        """Runs num_clients clients that each send one request after another, and waits for their last ones."""
        bodies: list[Body] = []
        answers: list[bytes | BaseException] = []
        stop = asyncio.Event()

        async def ask_on(client: Any) -> None:
            while not stop.is_set():
                body = _body(len(bodies) % 4)
                [answer] = await asyncio.gather(post(client, body), return_exceptions=True)
                bodies.append(body)
                answers.append(answer)

        async with open_client(self._url) as client:
            clients = [asyncio.create_task(ask_on(client)) for _ in range(num_clients)]
            yield bodies, answers
            stop.set()
            await asyncio.gather(*clients)

    async def _until(self, condition: Any) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                self._most_encoders = max(self._most_encoders, len(replicas("Encoder", "RUNNING", "STARTING")))
                await asyncio.sleep(0.1)

    def _row(self, event: str, bodies: list[Body], answers: list[bytes | BaseException], seconds: float) -> Row:
        return {
            "event": event,
            **self._judge.judge(bodies, answers),
            **self._shape(),
            "seconds": seconds,
        }

    def _shape(self) -> Row:
        placed = [group["bundles_to_node_id"] for group in placement_group_table().values() if _is_placed(group)]
        groups = sorted(len(set(nodes.values())) for nodes in placed)
        return {"encoders": self._most_encoders, "groups": " + ".join(map(str, groups))}


async def _denoise(request: GenerationRequest) -> None:
    encoder, transformer = (serve.get_deployment_handle(name, APP_NAME) for name in ("Encoder", "Transformer"))
    conditioning = encoder.encode.remote(request)
    async for _ in transformer.options(stream=True).denoise.remote(conditioning, request):
        pass


def replicas(deployment: str, *states: str) -> list[dict[str, Any]]:
    """Returns a deployment's replicas in these states, as the dashboard shows them: `node_id`, `state`, `pid`.

    Serve's public status does not include nodes.
    """
    details = _get_global_client().get_serve_details()
    replicas: list[dict[str, Any]] = details["applications"][APP_NAME]["deployments"][deployment]["replicas"]
    return [replica for replica in replicas if replica["state"] in states]


def _is_placed(group: dict[str, Any]) -> bool:
    return bool(group["state"] == "CREATED")


def _body(i: int) -> Body:
    """Returns a body that differs from the others in everything in which requests of one size may differ."""
    return {
        "prompt": f"prompt {i}",
        "seed": i,
        "num_inference_steps": 20 + 2 * i,
        "guidance_scale": 2.0 + i % 3,
    }


def _config() -> AppConfig:
    here: dict[str, Any] = {"num_cpus": 0.1, "torch_threads": 1, "labels": {"has": "gpus"}}
    elastic = {"upscale_delay_s": 0.5, "downscale_delay_s": 1.0}
    sleepy = {"min_replicas": 0, "downscale_delay_s": 60.0}  # longer than a wave of 16 clients denoises
    return parse_app_config(
        {
            "model": {"name": "tiny", "checkpoint": "tiny://flux", "defaults": {"width": 64, "height": 64}},
            "encoder": here | elastic | {"max_sequence_length": 64, "max_replicas": 2, "target_load": 2},
            "transformer": here | elastic | {"shards": 2, "num_gpus": 1, "max_replicas": 2, "max_batch_size": 1},
            "vae": here | sleepy,
            "limits": {"max_num_inference_steps": DRAIN_STEPS},
        }
    )


@contextmanager
def cluster_of(*workers: Mapping[str, Any]) -> Iterator[Cluster]:
    """Runs a cluster of a head without GPUs and these workers."""
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    try:
        for worker in workers:
            cluster.add_node(**worker)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@contextmanager
def serving(config: AppConfig) -> Iterator[str]:
    """Serves the app on a free port of the head; yields its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(build_app(config), name=APP_NAME)
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()

"""The ways to serve one checkpoint that `relay bench compare` compares. Each uses all cores, or all GPUs."""

import base64
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
from ray import serve
from ray.serve import Application

from deployments.config.model import ModelConfig
from serve_app.app import build_app
from serve_app.bench.answers import TIMEOUT_S
from serve_app.bench.whole import BatchingPipeline, Fields, Placement, PlainPipeline, WholePipeline
from serve_app.config.app import AppConfig
from serve_app.config.serve_file import APP_NAME, parse_app_config

Draw = Callable[[Fields], bytes]
"""Takes an HTTP body and returns an image; called from several threads."""
OURS, PLAIN = "relay", "diffusers"
QUICK = ("whole x N", "batched x N")
"""Contenders of a quick comparison, besides those two."""
MAX_ONGOING = 64


@dataclass(frozen=True)
class Site:
    """The model, the hardware and the server that every contender uses."""

    model: ModelConfig
    num_cores: int
    num_gpus: int
    url: str
    """URL of Serve's HTTP proxy."""
    max_sequence_length: int | None = None

    @property
    def num_copies(self) -> int:
        """How many copies use all the hardware, with one core or GPU each."""
        return self.num_gpus or self.num_cores

    def config(self, *, num_threads: int = 1, **transformer: Any) -> AppConfig:
        """Returns the config of an app, or of one process with all three stages.

        num_threads: torch threads of each process.
        """
        stage: dict[str, Any] = {"num_cpus": 0.1, "torch_threads": num_threads}
        shares = dict.fromkeys(("encoder", "transformer", "vae"), stage)
        if self.num_gpus:
            copies = {"min_replicas": self.num_gpus, "max_replicas": self.num_gpus, "dtype": "bfloat16"}
            gpus = {"encoder": 0.2, "transformer": 0.6, "vae": 0.2}
            shares = {name: stage | copies | {"num_gpus": share} for name, share in gpus.items()}
        texts = {} if self.max_sequence_length is None else {"max_sequence_length": self.max_sequence_length}
        return parse_app_config(
            {
                "model": self.model.model_dump(),
                "encoder": shares["encoder"] | texts,
                "transformer": shares["transformer"] | transformer,
                "vae": shares["vae"],
            }
        )


@dataclass(frozen=True)
class Contender:
    """One way to serve the checkpoint, and how to start it."""

    start: Callable[[Site], AbstractContextManager[Draw]]
    min_gpus: int = 0
    """With fewer GPUs, this contender is left out."""
    max_gpus: int | None = None

    def find_fault(self, site: Site) -> str | None:
        """Returns why this contender is left out on this machine, or None."""
        if site.num_gpus < self.min_gpus:
            return f"needs {self.min_gpus} GPU{'s' if self.min_gpus > 1 else ''}, but there are {site.num_gpus}"
        if self.max_gpus is not None and site.num_gpus > self.max_gpus:
            return "is for machines without a GPU"
        return None


def build_contenders(site: Site) -> dict[str, Contender]:
    """Returns the contenders by name, plain diffusers first and relay last. All use the same checkpoint.

    Each process has one torch thread, so that N of them use N cores. Plain diffusers is also run with N threads:
    which is faster depends on the model, and on what else the machine does.
    """
    copies = site.num_copies
    replicas: dict[str, Any] = {} if site.num_gpus else {"min_replicas": copies, "max_replicas": copies}
    return {
        PLAIN: Contender(_plain),
        "diffusers x N threads": Contender(partial(_plain, num_threads=site.num_cores), max_gpus=0),
        "cpu offload": Contender(partial(_plain, placement="cpu_offload"), min_gpus=1),
        "device_map": Contender(partial(_plain, placement="device_map"), min_gpus=2),
        "whole x N": Contender(partial(_whole, WholePipeline)),
        "batched x N": Contender(partial(_whole, BatchingPipeline)),
        "sharded over N": Contender(partial(_ours, name="sharded", shards=copies), max_gpus=0),
        OURS: Contender(partial(_ours, **replicas)),
    }


@contextmanager
def _plain(site: Site, placement: Placement = "device", num_threads: int = 1) -> Iterator[Draw]:
    """Runs plain diffusers in a separate process, one request after another, as a script would."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    config = site.config(num_threads=num_threads)
    process = context.Process(target=_serve_plain, args=(config, placement, theirs), daemon=True)
    process.start()

    def draw(fields: Fields) -> bytes:
        ours.send(fields)
        picture: bytes = ours.recv()
        return picture

    with ThreadPoolExecutor(1) as line:  # serves requests in order of arrival
        try:
            yield lambda fields: line.submit(draw, fields).result()
        finally:
            process.terminate()
            process.join()


def _serve_plain(config: AppConfig, placement: Placement, requests: Any) -> None:
    pipeline = PlainPipeline(config, placement)
    while True:
        requests.send(pipeline.draw(**requests.recv()))


def _whole(kind: type[WholePipeline], site: Site) -> AbstractContextManager[Draw]:
    application = serve.deployment(kind).options(
        num_replicas=site.num_copies,
        max_ongoing_requests=MAX_ONGOING,
        ray_actor_options={"num_cpus": 0.1, "num_gpus": 1 if site.num_gpus else 0},
    )
    return _deployed(site, application.bind(site.config()), kind.__name__, path="/")


def _ours(site: Site, name: str = APP_NAME, **transformer: Any) -> AbstractContextManager[Draw]:
    return _deployed(site, build_app(site.config(**transformer)), name, path="/v1/images/generations")


@contextmanager
def _deployed(site: Site, application: Application, name: str, *, path: str) -> Iterator[Draw]:
    serve.run(application, name=name, route_prefix=f"/{name}")
    with httpx.Client(base_url=f"{site.url}/{name}", timeout=TIMEOUT_S) as client:

        def draw(fields: Fields) -> bytes:
            answer = client.post(path, json=fields).raise_for_status().json()
            return base64.b64decode(answer["data"][0]["b64_json"])

        yield draw
    serve.delete(name)

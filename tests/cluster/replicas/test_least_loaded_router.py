"""Tests that long requests that come through several ingresses are spread over all replicas."""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.replicas.least_loaded_router import UNDER_WAY_S, LeastLoadedRouter, ReplicaLoad
from cluster.replicas.resources import ResourceConfig
from cluster.replicas.serve_options import plan_serve_options

pytestmark = pytest.mark.slow

TIMEOUT_S = 30.0
ROUNDS = 12
"""Several rounds, because random routing would pass half of them."""


class Replica:
    async def work(self, folder: Path) -> int:
        """Creates a file in the folder, and works until the folder contains a file named `over`."""
        (folder / uuid4().hex).touch()
        async with asyncio.timeout(TIMEOUT_S):
            while not (folder / "over").exists():
                await asyncio.sleep(0.01)
        return os.getpid()


class PatientRouter(LeastLoadedRouter):
    """Waits for slow replies, which a busy machine may cause: the test is about where requests go after the
    replies."""

    queue_len_response_deadline_s = TIMEOUT_S


class Ingress:
    def __init__(self, replicas: Any) -> None:
        self._replicas = replicas

    async def ask(self, folder: Path, number: int) -> list[int]:
        return await asyncio.gather(*(self._replicas.work.remote(folder) for _ in range(number)))


@pytest.fixture(scope="module")
def ingresses(serve_url: str) -> Iterator[list[DeploymentHandle]]:
    resources = ResourceConfig(num_cpus=0, min_replicas=2, max_replicas=2)
    options = plan_serve_options(resources, graceful_shutdown_timeout_s=1.0)
    options["request_router_config"] = {"request_router_class": f"{__name__}.{PatientRouter.__name__}"}
    replicas = serve.deployment(Replica).options(**options)
    ingress = serve.deployment(Ingress).options(ray_actor_options={"num_cpus": 0})
    serve.run(ingress.bind(replicas.bind()), name="routed-0", route_prefix=None)
    stage = serve.get_deployment_handle("Replica", "routed-0")
    serve.run(ingress.bind(stage), name="routed-1", route_prefix=None)
    yield [serve.get_app_handle(f"routed-{i}") for i in range(2)]
    for i in (1, 0):
        serve.delete(f"routed-{i}")


def spread(ingresses: list[DeploymentHandle], folder: Path, numbers: tuple[int, int]) -> list[int]:
    """Returns how many requests each replica gets when each ingress sends its number of them, one ingress after
    the other."""
    folder.mkdir()
    answers, sent = [], 0
    for ingress, number in zip(ingresses, numbers, strict=True):
        answers.append(ingress.ask.remote(folder, number))
        sent += number
        deadline = time.monotonic() + TIMEOUT_S
        while len(list(folder.iterdir())) < sent:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    (folder / "over").touch()
    return sorted(Counter(pid for answer in answers for pid in answer.result(timeout_s=TIMEOUT_S)).values())


def test_two_requests_by_two_ingresses_have_a_replica_each(ingresses: Any, tmp_path: Path) -> None:
    assert [spread(ingresses, tmp_path / str(i), (1, 1)) for i in range(ROUNDS)] == [[1, 1]] * ROUNDS


def test_a_burst_of_eight_is_shared_evenly(ingresses: Any, tmp_path: Path) -> None:
    assert [spread(ingresses, tmp_path / str(i), (8, 0)) for i in range(ROUNDS)] == [[4, 4]] * ROUNDS


@pytest.mark.parametrize("num_counted", [0, 1, 2])
def test_a_reply_may_count_requests_that_are_not_confirmed(num_counted: int) -> None:
    load = ReplicaLoad()
    assert load.update(3, now=0.0) == 3
    load.sent_at.extend([1.0, 1.0])
    assert load.update(3 + num_counted, now=2.0) == 5


def test_others_requests_come_and_go() -> None:
    load = ReplicaLoad(confirmed=2)
    assert [load.update(num_ongoing, now=0.0) for num_ongoing in (5, 2, 3)] == [5, 2, 3]


def test_an_own_request_counts_until_its_end_is_known() -> None:
    assert ReplicaLoad(confirmed=2).update(1, now=0.0) == 2


def test_a_request_that_is_never_confirmed_counts_for_a_while_only() -> None:
    load = ReplicaLoad()
    load.sent_at.append(0.0)
    assert [load.update(0, now) for now in (UNDER_WAY_S, UNDER_WAY_S + 1)] == [1, 0]


def test_what_another_ingress_has_sent_counts(ingresses: Any, tmp_path: Path) -> None:
    assert spread(ingresses, tmp_path / "three", (3, 3)) == [3, 3]
    assert spread(ingresses, tmp_path / "five", (5, 7)) == [6, 6]

"""Tests of SIGTERM in a process whose main thread runs other code, as a worker's runs Ray's."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._common.utils import import_attr
from ray.exceptions import RayActorError

from cluster.termination import DrainOnSigterm, ToldToGo, exit_on_sigterm
from serve_app.commands.ray_environment import RAY_ENVIRONMENT

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """
import signal, sys, threading
from cluster.termination import on_sigterm

told = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: sys.exit("the main thread's handler"))
setting = threading.Thread(target=on_sigterm, args=(told.set,))
setting.start()
setting.join()
print("ready", flush=True)
told.wait()
print("told", flush=True)
"""


def test_another_thread_hears_of_it_in_place_of_the_main_threads_handler() -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=20)[0] == "told\n"


class Replica(DrainOnSigterm):
    """A minimal deployment, run as a Ray actor."""

    def __init__(self) -> None:
        self.drain_on_sigterm()

    async def pid(self) -> int:
        return os.getpid()

    async def serve(self) -> str:
        await asyncio.sleep(1.0)
        return "served"


def is_healthy(replica: Any) -> bool:
    try:
        ray.get(replica.check_health.remote())
    except ToldToGo:
        return False
    return True


@pytest.mark.slow
def test_a_replica_that_got_one_is_unhealthy_and_serves_on(ray_cluster: None) -> None:
    replica = ray.remote(Replica).options(num_cpus=0).remote()
    pid = ray.get(replica.pid.remote())
    ray.get(replica.check_health.remote())
    running = replica.serve.remote()
    os.kill(pid, signal.SIGTERM)
    while is_healthy(replica):
        pass
    assert ray.get([running, replica.serve.remote()]) == ["served", "served"]
    ray.kill(replica)


class Controller:
    """Like Serve's controller: one of its calls never ends."""

    def __init__(self) -> None:
        exit_on_sigterm()

    async def pid(self) -> int:
        return os.getpid()

    async def listen(self) -> None:
        await asyncio.Event().wait()


@pytest.mark.slow
def test_a_controller_that_got_one_is_started_anew_though_calls_run_in_it(ray_cluster: None) -> None:
    actor = ray.remote(Controller).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
    pid = ray.get(actor.pid.remote())
    listening = actor.listen.remote()
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while ray.get(actor.pid.remote(), timeout=20) == pid:
        assert time.monotonic() < deadline
    ray.kill(actor)
    with pytest.raises(RayActorError):
        ray.get(listening)


def test_serves_controller_loads_it() -> None:
    path = RAY_ENVIRONMENT["RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH"]
    assert import_attr(path) is exit_on_sigterm


def test_outside_of_rays_processes_nothing_is_changed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    replica = Replica()
    assert signal.getsignal(signal.SIGTERM) == before
    asyncio.run(replica.check_health())

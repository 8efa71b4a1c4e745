"""Runs Ray and Serve for one command: reports how they start, watches them, and ends them."""

import contextlib
import io
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from types import FrameType
from typing import Any, NoReturn

import httpx
import ray
from ray import serve
from ray._private import worker as ray_worker
from ray.exceptions import RayError
from ray.serve._private.api import serve_start
from ray.serve.config import gRPCOptions
from ray.serve.exceptions import RayServeException
from ray.serve.schema import (
    ApplicationStatus,
    ServeDeploySchema,
    ServeInstanceDetails,
)
from rich.console import Console

from cluster.processes import find_descendants, kill_all
from serve_app.commands.deployment_states import StartFailed, check_failed, deployment_states, last_line
from serve_app.commands.port import url_of
from serve_app.commands.start_progress import StartProgress

CHECK_EVERY_S = 0.5
CHECKS_PER_LIST = 10
"""Number of checks of Ray between two lists of the processes that came of this one."""
_ESSENTIAL = ("raylet", "gcs_server")
"""Ray processes without which nothing works, by the names that Ray's node object uses."""


class Terminal(Console):
    """A console that goes silent, without an error, when its pipe is closed or its terminal has hung up."""

    def print(self, *objects: Any, **options: Any) -> None:
        with contextlib.suppress(OSError):
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        self.quiet = True


console = Terminal(stderr=True, soft_wrap=True, highlight=False)


class RayGone(StartFailed):
    """Ray itself is gone, so nothing can be shut down in order any more."""


def run_server(
    deployment: ServeDeploySchema, models: Mapping[str, str], *, address: str, grace_s: float, is_verbose: bool
) -> int:
    """Serves until SIGINT, SIGTERM or SIGHUP, then ends what it started. Returns the exit code.

    Args:
        models: by name of an application that serves models: the subject of "… ready", such as `flux-dev is`.
        address: "local", or the address of a Ray cluster to join, whose Serve is shut down at the end.
        grace_s: seconds that running requests get to finish. A second signal ends them at once.
        is_verbose: whether the logs of Ray and Serve are shown too.
    """
    server, code = Server(deployment, models, address, is_verbose=is_verbose), 0
    on_signals(_interrupt)
    try:
        server.start()
        server.wait_until_ready()
        server.watch()
    except KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt):
            server.drain(grace_s)
    except StartFailed as error:
        console.print(f"relay: {error}", style="red")
        code = 1
        if isinstance(error, RayGone):
            kill(code, server.seen)
    on_signals(lambda number, _frame: kill(128 + number, server.seen))
    server.end()
    return code


def kill(code: int, others: Iterable[int] = ()) -> NoReturn:
    """Kills this process, all its descendants, and `others`, at once."""
    kill_all(find_descendants().union(others))
    os._exit(code)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def on_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Sets the handler of SIGINT, SIGTERM and SIGHUP. If SIGHUP is ignored, as under `nohup`, it stays ignored."""
    hangup = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
    for number in (signal.SIGINT, signal.SIGTERM, *hangup):
        signal.signal(number, handler)


class Server:
    """One Serve instance, with HTTP, that runs the applications of one config file."""

    def __init__(
        self, deployment: ServeDeploySchema, models: Mapping[str, str], address: str, *, is_verbose: bool
    ) -> None:
        self._deployment, self._models, self._address = deployment, models, address
        self._is_verbose = is_verbose
        self._is_local = address == "local"
        self._client: Any = None
        self._is_ready = False
        self.seen: set[int] = set()
        """Descendants of this process, as last listed: the workers of a dead raylet are no longer descendants."""

    def start(self) -> None:
        """Starts Ray and deploys; returns before anything is ready. Raises StartFailed."""
        try:
            self._init_ray()
            on_signals(_interrupt)  # ray.init has replaced the handlers
            self._deploy()
        except (ConnectionError, TimeoutError, RayError) as error:
            raise StartFailed(last_line(str(error))) from error

    def _init_ray(self) -> None:
        if self._is_verbose:
            ray.init(address=self._address, namespace="serve")
            return
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        context = ray.init(address=self._address, namespace="serve", log_to_driver=False, logging_level="ERROR")
        console.print(f"relay: logs: {context.address_info['session_dir']}/logs/serve; with --verbose, also here")
        if context.dashboard_url:
            console.print(f"relay: Ray's dashboard: http://{context.dashboard_url}")

    def _deploy(self) -> None:
        self._client = serve_start(
            http_options=self._deployment.http_options.model_dump(),
            proxy_location=self._deployment.proxy_location,
            grpc_options=gRPCOptions(**self._deployment.grpc_options.model_dump()),
            controller_options=self._deployment.controller_options,
        )
        self._client.deploy_apps(self._deployment)

    def wait_until_ready(self) -> None:
        """Shows what is loading, and the addresses once all is ready. Raises StartFailed."""
        urls = self._urls()
        with StartProgress(console) as progress:
            while not self._is_ready:
                time.sleep(CHECK_EVERY_S)
                self._check_ray()
                applications = self._applications()
                check_failed(applications)
                progress.update(deployment_states(applications))
                self._is_ready = self._is_running(applications) and all(map(_is_healthy, urls.values()))
        for name, url in urls.items():
            console.print(f"relay: {self._models[name]} ready: {url}/ (Ctrl-C ends it)", style="bold green")

    def watch(self) -> NoReturn:
        """Checks Ray until the command is interrupted. Raises RayGone if it has died."""
        while True:
            self.seen = find_descendants()
            for _ in range(CHECKS_PER_LIST):
                time.sleep(CHECK_EVERY_S)
                self._check_ray()

    def drain(self, grace_s: float) -> None:
        """Waits until no request is in progress, or grace_s is over. The rest end with the processes."""
        deadline, told = time.monotonic() + grace_s, False
        while self._is_ready and time.monotonic() < deadline and (running := self._num_in_progress()):
            if not told:
                requests = "1 request" if running == 1 else f"{running} requests"
                console.print(
                    f"relay: {requests} in progress: waiting up to {grace_s:g} s; Ctrl-C again ends at once"
                )
                told = True
            time.sleep(min(CHECK_EVERY_S, grace_s))
        console.print("relay: stopping")

    def end(self) -> None:
        """Ends a local Ray with all its processes; of a cluster that was joined, only its Serve."""
        with _silence():
            if not self._is_local:
                if self._client is not None:
                    self._client.shutdown()
                ray.shutdown()
                return
            self.seen, node = find_descendants(), ray_worker._global_node
            for name, process in node.live_processes() if node is not None else ():
                if name not in _ESSENTIAL:  # else ray.shutdown waits up to a second for each in turn
                    process.terminate()
            ray.shutdown()
            kill_all(self.seen)

    def _urls(self) -> dict[str, str]:
        """Returns the URLs of the applications that serve a checkpoint over HTTP, by name."""
        http = self._deployment.http_options
        base = url_of(http.host, http.port, "http" if http.ssl_certfile is None else "https")
        routes = {each.name: each.route_prefix for each in self._deployment.applications}
        return {
            name: base + str(routes[name]).rstrip("/")
            for name in self._models
            if routes[name] is not None and self._deployment.proxy_location != "Disabled"
        }

    def _is_running(self, applications: Mapping[str, Any]) -> bool:
        names = [each.name for each in self._deployment.applications]
        found = [applications[name].status for name in names if name in applications]
        return found == [ApplicationStatus.RUNNING] * len(names)

    def _applications(self) -> Mapping[str, Any]:
        try:
            details = ServeInstanceDetails(**self._client.get_serve_details())
        except RayError as error:
            raise StartFailed(f"Serve's controller does not answer: {last_line(str(error))}") from error
        applications: Mapping[str, Any] = details.applications
        return applications

    def _check_ray(self) -> None:
        node = ray_worker._global_node
        for name, process in node.dead_processes() if self._is_local and node is not None else ():
            if name in _ESSENTIAL:
                why = f"Ray's {name} has ended (code {process.poll()}), and nothing can be served without it"
                raise RayGone(f"{why}; its logs: {node.get_session_dir_path()}/logs")

    def _num_in_progress(self) -> int:
        """Returns the number of requests; an application that is too busy to answer counts as one, a dead one as
        none."""
        running = 0
        for name in self._models:
            try:
                handle = serve.get_app_handle(name)
                running += sum(handle.broadcast("num_in_progress").results(timeout_s=1.0))
            except TimeoutError:
                running += 1
            except (RayError, RayServeException):
                continue
        return running


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppresses what Ray prints about processes that are meant to end."""
    logging.disable(logging.CRITICAL)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _is_healthy(url: str) -> bool:
    """Whether /health answers 200. Does not verify a certificate, which is for the name that clients use."""
    try:
        answer = httpx.get(f"{url}/health", timeout=5, trust_env=False, verify=False)
        return answer.status_code == HTTPStatus.OK
    except httpx.TransportError:
        return False

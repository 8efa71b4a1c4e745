"""Tests of who can reach the ports of a served app."""

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
import psutil
from ray._raylet import AuthenticationTokenLoader
from ray.serve.generated import serve_pb2, serve_pb2_grpc

from tests.app import App


def listening() -> Iterator[tuple[str, str, int]]:
    """Yields (process, address, port) where this process or a descendant listens: Ray, Serve and the stages."""
    here = psutil.Process()
    for process in (here, *here.children(recursive=True)):
        for socket in process.net_connections("tcp"):
            if socket.status == psutil.CONN_LISTEN:
                yield process.cmdline()[0], socket.laddr.ip, socket.laddr.port


def replica_ports(app: App) -> list[int]:
    """Returns the ports of this app's replicas alone: in other apps, a transformer of several shards also listens
    for its ranks, in another protocol."""
    mine = f"ray::ServeReplica:{app.name}:"
    return [port for name, _, port in listening() if name.startswith(mine)]


def test_a_served_app_listens_on_the_loopback_interface_only(flux_app: App) -> None:
    found = list(listening())
    assert {name.partition(":")[0] for name, _, _ in found} > {"ray"}
    assert len(replica_ports(flux_app)) >= 4
    assert [each for each in found if not is_loopback(each[1])] == []


def is_loopback(address: str) -> bool:
    found = ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


class Intrusion:
    """An object whose pickle creates a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def test_a_replica_runs_a_pickle_only_of_who_has_the_token(flux_app: App, tmp_path: Path) -> None:
    request = serve_pb2.ASGIRequest(pickled_request_metadata=pickle.dumps(Intrusion(tmp_path / "intruded")))
    answers = {call(port, request) for port in replica_ports(flux_app)}
    assert answers == {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}  # Serve's port, and Ray's
    assert not list(tmp_path.iterdir())
    token = AuthenticationTokenLoader.instance().get_token_for_http_header()
    assert {call(port, request, token) for port in replica_ports(flux_app)} == {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.UNIMPLEMENTED,
    }
    assert list(tmp_path.iterdir())


def call(port: int, request: Any, metadata: Mapping[str, str] = MappingProxyType({})) -> grpc.StatusCode:
    """Calls the port as one replica calls another, and returns the status of the answer."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = serve_pb2_grpc.ASGIServiceStub(channel)
        try:
            stub.HandleRequest(request, timeout=10, metadata=tuple(metadata.items()))
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
    return grpc.StatusCode.OK


def test_what_the_command_line_starts_is_a_ray_of_this_machine_only() -> None:
    """Ray reads this setting when it is imported."""
    program = """if True:
        import contextlib, sys
        from serve_app.cli import main
        sys.argv[1:] = ["--version"]
        with contextlib.suppress(SystemExit):
            main()
        from ray._private import ray_constants
        print(ray_constants.ENABLE_RAY_CLUSTER)
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "False"

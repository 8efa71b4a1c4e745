"""Test of docs/operations.md's commands for one's own machines, after a local Ray has written its token."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def ports() -> dict[str, int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    found = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return dict(zip(("gcs", "dashboard", "http"), found, strict=True))


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory, ports: dict[str, int]) -> dict[str, str]:
    """Environment of a user with an empty home folder who follows first the README, then operations.md."""
    home = tmp_path_factory.mktemp("home")
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"HOME": str(home)}
    picture = [BIN / "relay", "generate", "a red circle", "--config", "configs/quickstart.yaml"]
    subprocess.run([*picture, "--out", home / "a.png"], cwd=ROOT, env=env, check=True, timeout=PATIENCE_S)
    assert (home / ".ray" / "auth_token").stat().st_size
    return env | {
        "RAY_AUTH_MODE": "token",
        "RAY_ADDRESS": f"127.0.0.1:{ports['gcs']}",
        "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{ports['dashboard']}",
    }


@pytest.fixture(scope="module")
def head(env: dict[str, str], ports: dict[str, int]) -> Iterator[None]:
    """Runs `ray start --head` in the foreground, because `ray stop` would end every Ray of this machine."""
    command = [BIN / "ray", "start", "--head", "--block", "--num-cpus=4", "--node-ip-address=127.0.0.1"]
    command += [f"--port={ports['gcs']}", f"--dashboard-port={ports['dashboard']}"]
    starting = {name: value for name, value in env.items() if name not in {"RAY_ADDRESS", "RAY_DASHBOARD_ADDRESS"}}
    process = subprocess.Popen(
        command, env=starting, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{ports['dashboard']}"
    wait_for(f"{url}/api/version", 401)
    yield
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    _, alive = psutil.wait_procs(started, timeout=30)
    for each in alive:
        each.kill()


def wait_for(url: str, status: int = 200) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=5).status_code == status:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    pytest.fail(f"{url} never answered {status}")


@pytest.mark.thorough
@pytest.mark.usefixtures("head")
def test_serve_deploy_and_serve_status_work_with_the_token_that_a_local_ray_wrote(
    env: dict[str, str], ports: dict[str, int], tmp_path: Path
) -> None:
    """Starts two Rays, which load two cores."""
    config = tmp_path / "quickstart.yaml"
    config.write_text(
        (ROOT / "configs" / "quickstart.yaml").read_text().replace("port: 8000", f"port: {ports['http']}")
    )

    def serve(*args: str) -> str:
        command = [BIN / "serve", *args]
        return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    serve("deploy", str(config))
    wait_for(f"http://127.0.0.1:{ports['http']}/health")
    assert "status: RUNNING" in serve("status")
    token = (Path(env["HOME"]) / ".ray" / "auth_token").read_text()
    url = f"http://127.0.0.1:{ports['dashboard']}/api/version"
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, headers={"Authorization": f"Bearer {token}"}).status_code == 200

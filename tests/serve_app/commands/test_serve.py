"""Tests that `relay serve` reports mistakes before anything starts. test_quickstart.py tests the server itself."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deployments.checkpoints.source import fetch_checkpoint
from serve_app.cli import cli
from serve_app.config.app import ConfigError
from tests.relay_server import ENV, QUICKSTART, RELAY, ROOT, free_port, serving

pytestmark = pytest.mark.slow
OPEN_TO_ALL = (
    "http_options.host 0.0.0.0: other machines would reach this server, and it requires no key: under args, "
)


def mistakes(config: Path, *options: str) -> list[str]:
    """Runs the command in this process and returns the lines of its error."""
    error = CliRunner().invoke(cli, ["serve", str(config), *options], env={"RAY_ADDRESS": "local"}).exception
    assert isinstance(error, ConfigError)
    return [line for line in str(error).splitlines() if not line.startswith("port 8000 ")]  # it may be in use


@pytest.fixture(autouse=True)
def _own_import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path.copy())


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "transformer:",
            "transfomer:",
            ["config: unknown key 'transfomer' (did you mean 'transformer'?); allowed: "],
        ),
        (
            "num_cpus: 1",
            "num_cpu: 1",
            ["transformer: unknown key 'num_cpu' (did you mean 'num_cpus'?); allowed: "],
        ),
        ("http_options", "http_option", ["config: unknown key 'http_option' (did you mean 'http_options'?); "]),
        (
            "route_prefix",
            "route_prefx",
            ["applications.0: unknown key 'route_prefx' (did you mean 'route_prefix'?)"],
        ),
        ("route_prefix: /", "route_prefix: relay", ["applications.0: Invalid route_prefix 'relay', must start"]),
        ("route_prefix: /", "route_prefix: /a/", ["applications.0: Invalid route_prefix '/a/', may not end"]),
        ("  port: 8000", "  port: many", ["http_options.port: Input should be a valid integer, unable to parse"]),
        (
            "encoder: {num_cpus: 0.5, max",
            "encoder: {num_cpus: -1, dtyp: float16, max",
            ["encoder: unknown key 'dtyp' (did you mean 'dtype'?)", "encoder.num_cpus: Input should be greater"],
        ),
        (
            "embedded://shapes",
            "/no/such/folder",
            ["model.checkpoint: checkpoint '/no/such/folder' looks like a path"],
        ),
        ("embedded://shapes", "/" + "a" * 300, ["model.checkpoint: [Errno 36] File name too long: "]),
        (
            "embedded://shapes",
            "~no-one/x",
            ["model.checkpoint: checkpoint '~no-one/x' names a user that does not exist on"],
        ),
        (
            "embedded://shapes",
            "tiny://flix",
            ["model.checkpoint: checkpoint 'tiny://flix' is not a tiny checkpoint"],
        ),
        ("width: 128", "width: 120", ["model.defaults, or the family's"]),
    ],
)
def test_every_mistake_is_a_line_with_its_place(config: Path, old: str, new: str, told: list[str]) -> None:
    assert old in QUICKSTART
    config.write_text(QUICKSTART.replace(old, new))
    lines = mistakes(config)
    assert len(lines) == len(told)
    for line, expected in zip(lines, told, strict=True):
        assert line.startswith(f"{config}: {expected}")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: b: c", ", line 1, column 5: mapping values are not allowed here"),
        ("applications: [\n", ", line 2, column 1: "),
        ("", ": not a Ray Serve config"),
        ("applications: 3", ": not a Ray Serve config: applications must be a list"),
        ("applications: []", ": not a Ray Serve config: applications must be a list"),
        ("http_options:\n  port: 1\n  port: 2", ", line 3, column 3: the key 'port' occurs twice"),
    ],
)
def test_what_is_no_config_is_told_with_its_line(config: Path, text: str, told: str) -> None:
    config.write_text(text)
    [line] = mistakes(config)
    assert line.startswith(f"{config}{told}")


def test_mistakes_of_all_kinds_are_told_at_once(config: Path) -> None:
    text = QUICKSTART.replace("http_options", "http_option").replace("num_cpus: 1}", "num_cpus: -1}")
    text = text.replace("embedded://shapes", "/nowhere/shapes")
    config.write_text(
        text + "  - name: second\n    import_path: serve_app.app:build_ap\n    route_prefix: /second\n"
    )
    assert [line.partition(", ")[0].partition(";")[0] for line in mistakes(config)] == [
        f"{config}: transformer.num_cpus: Input should be greater than or equal to 0",
        f"{config}: model.checkpoint: checkpoint '/nowhere/shapes' looks like a path",
        f"{config}: import_path 'serve_app.app:build_ap' does not exist (did you mean 'serve_app.app:build_app'?)",
        f"{config}: config: unknown key 'http_option' (did you mean 'http_options'?)",
    ]


def test_what_keeps_it_from_starting_is_all_that_it_prints(config: Path) -> None:
    done = subprocess.run(
        [RELAY, "serve", str(config)], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120
    )
    told = f"relay: {config}: No such file or directory\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", told)


def test_of_several_applications_each_mistake_names_its_own(config: Path) -> None:
    head, _, app = QUICKSTART.partition("  - name: relay")
    broken = app.replace("vae: {num_cpus: 0.5}", "vae: {num_cpus: two}")
    other = broken.replace("route_prefix: /", "route_prefix: /two")
    config.write_text(f"{head}  - name: one{broken}\n  - name: two{other}")
    assert [line.partition(": vae.num_cpus")[0] for line in mistakes(config)] == [
        f"{config}, application one",
        f"{config}, application two",
    ]


def test_weights_that_are_not_whole_are_told_before_anything_starts(config: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(fetch_checkpoint("embedded://shapes", ()), tmp_path / "shapes")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    config.write_text(QUICKSTART.replace("embedded://shapes", str(folder)))
    [line] = mistakes(config)
    assert line.startswith(f"{config}: {weights} is cut short: it has ")


@pytest.mark.parametrize("port", [-1, 0, 70000])
def test_a_port_that_cannot_be_is_told(config: Path, port: int) -> None:
    config.write_text(QUICKSTART.replace("port: 8000", f"port: {port}"))
    assert mistakes(config) == [f"http_options.port must be between 1 and 65535, got {port}"]


def test_without_keys_nobody_else_is_let_in(config: Path) -> None:
    config.write_text(QUICKSTART)
    [line] = mistakes(config, "--host", "0.0.0.0", "--port", str(free_port()))
    assert line.startswith(OPEN_TO_ALL)
    for host in ("  host: 0.0.0.0\n", ""):  # no host: Serve's default is the same
        config.write_text(QUICKSTART.replace("  host: 127.0.0.1\n", host))
        [line] = mistakes(config, "--port", str(free_port()))
        assert line.startswith(OPEN_TO_ALL)


@pytest.mark.parametrize(
    ("args", "options"), [("open: true", ()), ("auth: {keys_file: KEYS}", ()), ("cors: null", ("--open",))]
)
def test_with_keys_or_if_it_says_so_they_are(
    config: Path, tmp_path: Path, args: str, options: tuple[str, ...]
) -> None:
    """Only the port is reported: listening on all interfaces is allowed."""
    (tmp_path / "keys.yaml").write_text("keys: []")
    args = args.replace("KEYS", str(tmp_path / "keys.yaml"))
    config.write_text(QUICKSTART.replace("args:\n", f"args:\n      {args}\n").replace("port: 8000", "port: 0"))
    told = mistakes(config, "--host", "0.0.0.0", *options)
    assert told == ["http_options.port must be between 1 and 65535, got 0"]


def test_a_file_of_keys_that_is_not_there_is_told(config: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    config.write_text(QUICKSTART.replace("args:\n", f"args:\n      auth: {{keys_file: {file}}}\n"))
    [line] = mistakes(config)
    assert line.endswith(f"auth.keys_file: {file} does not exist: `relay key create NAME --file {file}` makes it")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_taken_port_is_told_with_its_holder(config: Path, host: str) -> None:
    config.write_text(QUICKSTART)
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind((host, 0))
        holder.listen()
        port = holder.getsockname()[1]
        [line] = mistakes(config, "--port", str(port), "--host", host, "--open")
    assert line.startswith(f"port {port} of {host} is taken by ")
    assert f"(pid {os.getpid()})" in line


@pytest.mark.thorough
def test_a_stage_that_cannot_be_made_ends_it_with_its_sentence(tmp_path: Path) -> None:
    """Such mistakes cannot be found in files: for example, a class that this device cannot quantise."""
    log, config = tmp_path / "log", tmp_path / "config.yaml"
    config.write_text(
        QUICKSTART.replace("vae: {num_cpus: 0.5}", "vae: {num_cpus: 0.5, attention_backend: nonsense}")
    )
    with serving(config, log, "--port", str(free_port()), "--verbose") as process:
        assert process.wait(timeout=240) == 1
    lines = log.read_text().splitlines()
    assert any(line.startswith("relay: vae: ") and "nonsense" in line for line in lines)
    assert any("(ServeController pid=" in line for line in lines)

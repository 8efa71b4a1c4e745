"""The packages' arrows: serve_app -> deployments -> cluster, and who may import what."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("serve_app", "deployments", "cluster")
MAY_IMPORT = {"serve_app": set(PACKAGES), "deployments": {"deployments", "cluster"}, "cluster": {"cluster"}}
LAYERS = ("memory", "families", "checkpoints", "engine", "stages", "plan")
"""Of deployments: each imports itself and those before it."""
RAY_FILES = {
    "cluster/application.py",
    "cluster/autoscaling.py",
    "cluster/metrics.py",
    "cluster/nodes.py",
    "cluster/object_store_transport.py",
    "cluster/peers.py",
    "cluster/preload.py",
    "cluster/replica_port.py",
    "cluster/session_router.py",
    "cluster/shard_group.py",
    "cluster/sleeping.py",
    "cluster/termination.py",
    "cluster/unplaced.py",
    "serve_app/app.py",
    "serve_app/auth/counter.py",
    "serve_app/auth/metrics.py",
    "serve_app/auth/proxies.py",
    "serve_app/local.py",
    "serve_app/losses.py",
    "serve_app/replicas.py",
    "serve_app/room.py",
    "serve_app/server.py",
    "serve_app/streams.py",
    "serve_app/waking.py",
}
"""Who may import ray, besides the benchmarks: an upgrade of Ray touches these."""
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
NAMELESS = {"utils", "util", "helpers", "common", "misc", "base", "manager"}


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    ours = {name.partition(".")[0] for name in imports(ast.parse(path.read_text()))} & set(PACKAGES)
    assert ours <= MAY_IMPORT[package]


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_the_deployments_know_none_above_them(layer: str) -> None:
    found = {
        name.split(".")[1]
        for path in (ROOT / "deployments" / layer).rglob("*.py")
        for name in imports(ast.parse(path.read_text()))
        if name.startswith("deployments.")
    }
    assert found & set(LAYERS) <= set(LAYERS[: LAYERS.index(layer) + 1])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_imported_inside_a_function(path: Path) -> None:
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            assert not list(imports(function)), f"{function.name}, line {function.lineno}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_named_by_their_noun(path: Path) -> None:
    assert path.stem not in NAMELESS


def test_ray_is_imported_in_few_files() -> None:
    importers = {
        str(path.relative_to(ROOT))
        for path in FILES
        if "bench" not in path.parts
        and any(name.partition(".")[0] == "ray" for name in imports(ast.parse(path.read_text())))
    }
    assert importers == RAY_FILES


@pytest.mark.parametrize(
    "module", ["serve_app.app", "serve_app.ingress", "serve_app.cli", "deployments.rank", "cluster.preload"]
)
def test_the_ray_side_imports_no_torch(module: str) -> None:
    """The ingress stays small, and replicas create their children before they import anything heavy."""
    heavy = ("torch", "diffusers", "transformers", "accelerate")
    program = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_one_file_alone_knows_what_kinds_of_accelerators_torch_has() -> None:
    kinds = re.compile(r"torch\.(cuda|xpu|mps|accelerator)\.")
    found = {str(path.relative_to(ROOT)) for path in FILES if kinds.search(path.read_text())}
    assert found == {"cluster/accelerator.py"}

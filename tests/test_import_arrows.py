"""The directions of imports: serve_app -> deployments -> cluster, and which modules may import what."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.imports import imports

ROOT = Path(__file__).parent.parent
PACKAGES = ("serve_app", "deployments", "cluster")
MAY_IMPORT = {"serve_app": set(PACKAGES), "deployments": {"deployments", "cluster"}, "cluster": {"cluster"}}
LAYERS = {
    "cluster": ("machines", "replicas", "scaling", "ranks"),
    "deployments": ("memory", "families", "media", "checkpoints", "engine", "stages", "replica", "plan"),
}
"""Folders of a package, each of which imports only itself and those before it."""
NEIGHBOURS = {
    "flow": set(),
    "load": {"flow"},
    "inputs": {"config"},
    "auth": {"inputs", "page"},
    "http": {"flow", "inputs", "models"},
    "models": {"config", "http", "inputs", "load"},
    "jobs": {"auth", "flow", "http", "models"},
    "bench": {"auth", "commands", "config"},
}
"""Folders of serve_app, and the other folders that each imports."""
AT_THE_SIDE = {
    "serve_app.bench": {"serve_app/commands/bench_load.py"},
    "deployments.training": set[str](),
    "serve_app.commands": {"serve_app/cli.py"},
}
"""Code that no request runs, and the files that import it besides itself and the benchmarks. Commands look up the
rest by name when they are called."""
RAY_FILES = {
    "cluster/replicas/application.py",
    "cluster/scaling/autoscaling.py",
    "cluster/counted.py",
    "cluster/scaling/free_resources.py",
    "cluster/metrics.py",
    "cluster/machines/nodes.py",
    "cluster/ranks/object_store_transport.py",
    "cluster/replicas/least_loaded_router.py",
    "cluster/replicas/sibling_replicas.py",
    "cluster/preload.py",
    "cluster/replicas/replica_port.py",
    "cluster/ranks/shard_group.py",
    "cluster/scaling/sleeping.py",
    "cluster/termination.py",
    "serve_app/app.py",
    "serve_app/auth/counter.py",
    "serve_app/auth/proxies.py",
    "serve_app/jobs/metrics.py",
    "serve_app/commands/local.py",
    "serve_app/flow/retries.py",
    "serve_app/models/replicas.py",
    "serve_app/config/capacity_check.py",
    "serve_app/commands/deployment_states.py",
    "serve_app/commands/server.py",
    "serve_app/flow/streams.py",
    "serve_app/flow/wake_up.py",
}
"""Files that may import ray, besides the benchmarks: an upgrade of Ray affects these."""
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
NAMELESS = {"utils", "util", "helpers", "common", "misc", "base", "manager"}


@cache
def imports_of(path: Path) -> frozenset[str]:
    return frozenset(imports(ast.parse(path.read_text())))


def told(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_imports_point_one_way() -> None:
    against = {}
    for path in FILES:
        ours = {name.partition(".")[0] for name in imports_of(path)} & set(PACKAGES)
        if wrong := ours - MAY_IMPORT[path.relative_to(ROOT).parts[0]]:
            against[told(path)] = wrong
    assert not against


def folders_imported_by(package: str, folder: str) -> set[str]:
    """Returns the imported folders of the same package, without modules beside the folders."""
    found = {
        name.split(".")[1]
        for path in (ROOT / package / folder).rglob("*.py")
        for name in imports_of(path)
        if name.startswith(f"{package}.")
    }
    return {name for name in found if (ROOT / package / name).is_dir()}


@pytest.mark.parametrize(
    ("package", "layer"), [(package, layer) for package, layers in LAYERS.items() for layer in layers]
)
def test_layers_know_none_above_them(package: str, layer: str) -> None:
    layers = LAYERS[package]
    assert folders_imported_by(package, layer) & set(layers) <= set(layers[: layers.index(layer) + 1])


@pytest.mark.parametrize("folder", NEIGHBOURS)
def test_folders_of_the_application_know_their_neighbours_alone(folder: str) -> None:
    assert folders_imported_by("serve_app", folder) - {folder} == NEIGHBOURS[folder]


@pytest.mark.parametrize("aside", AT_THE_SIDE)
def test_nothing_that_serves_imports_benchmarks_training_or_commands(aside: str) -> None:
    importers = {
        told(path) for path in FILES if any(f"{name}.".startswith(f"{aside}.") for name in imports_of(path))
    }
    own = (f"{aside.replace('.', '/')}/", "serve_app/bench/")
    assert {path for path in importers if not path.startswith(own)} == AT_THE_SIDE[aside]


def test_nothing_is_imported_inside_a_function() -> None:
    inside = [
        f"{told(path)}:{function.lineno} {function.name}"
        for path in FILES
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and list(imports(function))
    ]
    assert not inside


def test_files_are_named_by_their_noun() -> None:
    assert not [told(path) for path in FILES if path.stem in NAMELESS]


def test_ray_is_imported_in_few_files() -> None:
    importers = {
        told(path)
        for path in FILES
        if "bench" not in path.parts and any(name.partition(".")[0] == "ray" for name in imports_of(path))
    }
    assert importers == RAY_FILES


RAY_SIDE = ("serve_app.app", "serve_app.ingress", "serve_app.cli", "deployments.replica.rank", "cluster.preload")


def test_the_ray_side_imports_no_torch() -> None:
    """Keeps the ingress small, and lets replicas create their children before they import anything heavy."""
    heavy = ("torch", "diffusers", "transformers", "accelerate")
    program = f"""
import importlib, sys
for module in {RAY_SIDE}:
    importlib.import_module(module)
    print(module, [name for name in {heavy} if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [f"{module} []" for module in RAY_SIDE]


def test_one_file_alone_knows_what_kinds_of_accelerators_torch_has() -> None:
    kinds = re.compile(r"torch\.(cuda|xpu|mps|accelerator)\.")
    found = {str(path.relative_to(ROOT)) for path in FILES if kinds.search(path.read_text())}
    assert found == {"cluster/machines/accelerator.py"}

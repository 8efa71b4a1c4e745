"""The wheel is complete, and works without this repository; test_quickstart.py serves it."""

import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.wheel import PACKAGES, ROOT, build_wheel, install_wheel

pytestmark = pytest.mark.slow

NOT_SERVED = "cluster/launch"
"""Files that start clusters, which are only in the repository."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_wheel(wheel, tmp_path_factory.mktemp("stranger") / "venv")


def run(program: Path, *args: str, cwd: Path) -> str:
    done = subprocess.run([str(program), *args], cwd=cwd, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def expected_files() -> Iterator[tuple[str, Path]]:
    """Yields what the wheel must hold: the files of the packages, and the configs inside one of them."""
    for package in PACKAGES:
        yield from ((str(path.relative_to(ROOT)), path) for path in (ROOT / package).rglob("*") if path.is_file())
    yield from ((f"serve_app/configs/{path.name}", path) for path in (ROOT / "configs").iterdir())


def test_it_holds_every_file_of_the_packages_as_it_is(wheel: Path) -> None:
    """Code, page, weights, configs, and the py.typed markers for type checkers."""
    expected = {name: path for name, path in expected_files() if "__pycache__" not in path.parts}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert held == {name for name in expected if not name.startswith(NOT_SERVED)}
        assert [name for name in held if archive.read(name) != expected[name].read_bytes()] == []
    assert {f"{package}/py.typed" for package in PACKAGES} <= held


def test_it_stands_without_the_repository(commands: Path, tmp_path: Path) -> None:
    where = run(commands / "python", "-c", "import serve_app; print(serve_app.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(commands.parent)


def test_it_tells_its_version(commands: Path, tmp_path: Path) -> None:
    [told] = run(commands / "relay", "--version", cwd=tmp_path).splitlines()
    assert told.startswith("latent-relay ")
    assert ", ray " in told


def test_it_lists_its_configs_and_where_they_lie(commands: Path, tmp_path: Path) -> None:
    *told, empty, where = run(commands / "relay", "serve", "--list", cwd=tmp_path).splitlines()
    assert [line.split()[0] for line in told] == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    assert all(len(line.split()) > 3 for line in told)
    assert empty == ""
    folder = Path(where.removeprefix("They are in ").partition(": ")[0])
    assert folder.is_relative_to(commands.parent)
    assert (folder / "quickstart.yaml").is_file()

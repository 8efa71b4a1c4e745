"""Tests of the configs that come with the package and are found by name."""

from pathlib import Path

import pytest

from serve_app.auth.listening import find_listening_fault
from serve_app.config.app import ConfigError
from serve_app.config.serve_file import load_app_config, read_serve_file
from serve_app.config.shipped import FOLDER, find_config, tell_configs


def test_a_config_that_comes_with_it_is_found_by_its_name() -> None:
    assert load_app_config(Path("quickstart")) == load_app_config(FOLDER / "quickstart.yaml")


def test_a_file_of_that_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sdxl").write_text("{}")
    Path("quickstart").mkdir()
    assert find_config(Path("sdxl")) == Path("sdxl")
    assert find_config(Path("quickstart")) == FOLDER / "quickstart.yaml"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            "quikstart",
            "quikstart: no such file, and no shipped config of that name (did you mean 'quickstart'?); `relay",
        ),
        ("x", "x: no such file, and no shipped config of that name; `relay serve --list` lists them"),
        (
            "configs/sdxl.yaml",
            "configs/sdxl.yaml: no such file; the config that comes with this package is",
        ),
        ("my/own", "my/own: No such file or directory"),
        ("own.yaml", "own.yaml: No such file or directory"),
        ("folder", "folder: Is a directory"),
    ],
)
def test_what_is_not_there_is_told(given: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    with pytest.raises(ConfigError) as refused:
        read_serve_file(Path(given))
    assert str(refused.value).startswith(told)


@pytest.mark.parametrize("name", tell_configs())
def test_nobody_else_reaches_what_it_serves_unless_it_asks_for_a_key(name: str) -> None:
    host = read_serve_file(Path(name))["http_options"]["host"]
    assert find_listening_fault(host, [load_app_config(Path(name)).access]) is None

"""Reads a Ray Serve YAML file, its application of this project, and the mistakes in it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cluster.config import find_mistakes
from serve_app.config.app import AppConfig, ConfigError
from serve_app.config.shipped import find_config

APP_NAME = "relay"
IMPORT_PATH = "serve_app.app:build_app"


def load_app_config(path: Path) -> AppConfig:
    """Returns the `args` of the application in a Serve YAML file that serves a checkpoint. Raises ConfigError."""
    ours = find_our_applications(path, read_serve_file(path))
    if len(ours) != 1:
        names = ", ".join(str(each.get("name")) for each in ours) or "none"
        raise ConfigError(
            f"{path}: one application must have import_path: {IMPORT_PATH}, got {names}; "
            "write the one to use into a file of its own"
        )
    return parse_app_config(ours[0].get("args") or {}, source=str(path))


class _UniqueKeys(yaml.SafeLoader):
    """Refuses duplicate keys, of which YAML would use the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                problem = f"the key {key.value!r} occurs twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add((key.tag, key.value))
        return node


def read_serve_file(path: Path) -> dict[str, Any]:
    """Returns the YAML of a Serve config: a file, or one that comes with this package, by its name.

    Raises ConfigError if there is none, or it is not valid YAML.
    """
    try:
        text = find_config(path).read_text(encoding="utf-8-sig")
        config = yaml.load(text, Loader=_UniqueKeys)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise ConfigError(f"{path}{where}: {error.problem or error.context}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise ConfigError(f"{path}: {why}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: not a Ray Serve config, because it has no keys such as applications")
    return config


def find_our_applications(path: Path, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the applications that serve a checkpoint. Raises ConfigError if `applications` is not a valid
    list."""
    applications = config.get("applications")
    is_list = isinstance(applications, list) and all(isinstance(each, dict) for each in applications)
    if not (is_list and applications):
        raise ConfigError(
            f"{path}: not a Ray Serve config: applications must be a list of name, import_path and args"
        )
    return [each for each in applications if each.get("import_path") == IMPORT_PATH]


def parse_app_config(args: Any, *, source: str = "") -> AppConfig:
    """Parses the `args`. Raises ConfigError with one line per mistake, which names the key and what is allowed."""
    mistakes = find_mistakes(AppConfig, args)
    if mistakes:
        raise ConfigError("\n".join(f"{source}: {line}" if source else line for line in mistakes))
    return AppConfig.model_validate(args)

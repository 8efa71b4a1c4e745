"""Generates docs/config.md, which explains every config key, from the config classes."""

import json
import re
from collections.abc import Container, Iterator
from types import NoneType
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from deployments.config.stage import StageConfig
from serve_app.config.app import AppConfig

INTRO = """\
# Configuration

This page answers: which keys may a config have, and what does each mean?

A config is a Ray Serve YAML file whose application has `import_path: serve_app.app:build_app`. These are the keys
under its `args:`. `relay config` prints this page. A memory technique may be written as the value of its first key
alone: `quantization: nf4`. [memory.md](memory.md) says what each technique saves and costs.
"""
STAGES = "`encoder`, `transformer`, `vae`"


def render_config_docs() -> str:
    """Returns Markdown: a section per part of the config, a row per key. Keys shared by all stages appear once."""
    sections = [INTRO, _section("`args`", AppConfig, leave_out=_parts())]
    for name, field in AppConfig.model_fields.items():
        part = _config_class(field)
        if name == "models":  # each model has the sections above
            sections.append(f"## `{name}`\n\n{field.description}\n")
        if part is None:
            continue
        if name == "encoder":
            sections.append(_section(STAGES, StageConfig))
        shared = StageConfig.model_fields if issubclass(part, StageConfig) else ()
        sections.append(_section(f"`{name}`", part, leave_out=shared))
    return "\n".join(sections)


def _parts() -> set[str]:
    """Returns the keys of an app that have a section of their own."""
    return {"models"} | {
        name for name, field in AppConfig.model_fields.items() if _config_class(field) is not None
    }


def _section(title: str, part: type[BaseModel], *, leave_out: Container[str] = ()) -> str:
    rows = "\n".join(_rows(part, leave_out=leave_out))
    return f"## {title}\n\n{_summary(part)}\n\n| key | value | default | |\n|---|---|---|---|\n{rows}\n"


def _summary(part: type[BaseModel]) -> str:
    return (part.__doc__ or "").strip().partition("\n")[0]


def _rows(part: type[BaseModel], prefix: str = "", leave_out: Container[str] = ()) -> Iterator[str]:
    for name, field in part.model_fields.items():
        if name in leave_out:
            continue
        nested = _config_class(field)
        if nested is not None:
            if field.default is None:
                yield f"| `{prefix}{name}` | {field.description} | off | {_summary(nested)} |"
            yield from _rows(nested, f"{prefix}{name}.")
        else:
            default = "required" if field.default is PydanticUndefined else f"`{_yaml(field.default)}`"
            yield f"| `{prefix}{name}` | {_values(field)} | {default} | {field.description or ''} |"
            for entry in _entry_classes(field):
                place = ".NAME" if get_origin(field.annotation) is dict else "[]"
                yield from _rows(entry, f"{prefix}{name}{place}.")


def _config_class(field: FieldInfo) -> type[BaseModel] | None:
    """Returns the config class of a field whose value is, or may be, a config; None for any other field."""
    kind = _without_none(field.annotation)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _entry_classes(field: FieldInfo) -> Iterator[type[BaseModel]]:
    """Yields the config classes of a list's entries or a dict's values."""
    for kind in get_args(field.annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield kind


def _without_none(annotation: Any) -> Any:
    """Returns `X` for `X | None`, and any other annotation unchanged."""
    if NoneType not in get_args(annotation):
        return annotation
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    return kinds[0] if len(kinds) == 1 else annotation


def _values(field: FieldInfo) -> str:
    kind = _without_none(field.annotation)
    name = kind.__name__ if isinstance(kind, type) else re.sub(r"\b(\w+\.)+", "", str(kind))
    if name.startswith("Literal["):
        name = name[8:-1].replace("'", "")
    limits = [f"{sign} {limit}" for sign, limit in _limits(field)]
    return " ".join([name.replace(" | None", "").replace("|", "or"), ", ".join(limits)]).strip()


def _limits(field: FieldInfo) -> Iterator[tuple[str, Any]]:
    for rule in field.metadata:
        for attribute, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
            limit = getattr(rule, attribute, None)
            if limit is not None:
                yield sign, limit


def _yaml(value: Any) -> str:
    return json.dumps(value).strip('"')

"""The page that explains every config key, written from the config classes themselves."""

import json
from collections.abc import Container, Iterator
from types import NoneType
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from deployments.config import StageConfig
from serve_app.config import AppConfig

INTRO = """\
# Configuration

A config is a Ray Serve YAML file whose application has `import_path: serve_app.app:build_app`; what follows
is what may stand under its `args:`. `relay config` prints this page. Of a memory technique the value of its first
key may stand for all: `quantization: nf4`. [memory.md](memory.md) tells what each saves and costs.
"""
STAGES = "`encoder`, `transformer`, `vae`"


def render_config_docs() -> str:
    """Markdown: a section per part of the config, a row per key; what all stages share comes once."""
    sections = [INTRO]
    for name, field in AppConfig.model_fields.items():
        part = _config_class(field)
        assert part is not None
        if name == "encoder":
            sections.append(_section(STAGES, StageConfig))
        sections.append(_section(f"`{name}`", part, leave_out=issubclass(part, StageConfig)))
    return "\n".join(sections)


def _section(title: str, part: type[BaseModel], *, leave_out: bool = False) -> str:
    """leave_out: what every stage may be told."""
    rows = "\n".join(_rows(part, leave_out=StageConfig.model_fields if leave_out else ()))
    return f"## {title}\n\n{_summary(part)}\n\n| key | value | default | |\n|---|---|---|---|\n{rows}\n"


def _summary(part: type[BaseModel]) -> str:
    return (part.__doc__ or "").strip().partition("\n")[0]


def _rows(part: type[BaseModel], prefix: str = "", leave_out: Container[str] = ()) -> Iterator[str]:
    for name, field in part.model_fields.items():
        if name in leave_out:
            continue
        nested, named = _config_class(field), _named_class(field)
        if named is not None:
            yield f"| `{prefix}{name}` | by name | `{{}}` | {field.description} |"
            yield from _rows(named, f"{prefix}{name}.NAME.")
        elif nested is not None:
            if field.default is None:
                yield f"| `{prefix}{name}` | {field.description} | off | {_summary(nested)} |"
            yield from _rows(nested, f"{prefix}{name}.")
        else:
            default = "required" if field.default is PydanticUndefined else f"`{_yaml(field.default)}`"
            yield f"| `{prefix}{name}` | {_values(field)} | {default} | {field.description or ''} |"


def _config_class(field: FieldInfo) -> type[BaseModel] | None:
    """The config class that a field holds, if it does or may."""
    kind = _without_none(field.annotation)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _named_class(field: FieldInfo) -> type[BaseModel] | None:
    """The config class of a dict's values."""
    kinds = get_args(field.annotation) if get_origin(field.annotation) is dict else ()
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _without_none(annotation: Any) -> Any:
    """`X` of `X | None`."""
    if NoneType not in get_args(annotation):
        return annotation
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    return kinds[0] if len(kinds) == 1 else annotation


def _values(field: FieldInfo) -> str:
    kind = _without_none(field.annotation)
    name = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
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

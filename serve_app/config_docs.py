"""The page that explains every config key, written from the config classes themselves."""

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from serve_app.config import AppConfig

INTRO = """\
# Configuration

A config is a Ray Serve YAML file whose application has `import_path: serve_app.app:build_app`; what follows
is what may stand under its `args:`. `relay config` prints this page.
"""


def render_config_docs() -> str:
    """Markdown: a section per part of the config, a row per key."""
    sections = [INTRO]
    for name, field in AppConfig.model_fields.items():
        part = _config_class(field)
        assert part is not None
        summary = (part.__doc__ or "").strip().partition("\n")[0]
        rows = "\n".join(_rows(part))
        sections.append(f"## `{name}`\n\n{summary}\n\n| key | value | default | |\n|---|---|---|---|\n{rows}\n")
    return "\n".join(sections)


def _rows(part: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in part.model_fields.items():
        nested = _config_class(field)
        if nested is not None:
            yield from _rows(nested, f"{prefix}{name}.")
        else:
            default = "required" if field.default is PydanticUndefined else f"`{_yaml(field.default)}`"
            yield f"| `{prefix}{name}` | {_values(field)} | {default} | {field.description or ''} |"


def _config_class(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _values(field: FieldInfo) -> str:
    kind = field.annotation
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

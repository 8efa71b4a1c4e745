"""Reads facts on pipelines from diffusers' sources, which are parsed, not imported: that would import torch."""

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

REQUIRED = ...
"""Stands for the default of a parameter that has none."""
_CLASS = re.compile(r"^class (\w+)\(", re.MULTILINE)


def call_parameters(pipeline_class: str) -> Mapping[str, Any]:
    """Returns the defaults of the parameters of its `__call__`, by name. Raises ValueError as `arguments_of`."""
    return arguments_of(pipeline_class, "__call__")


@cache
def arguments_of(pipeline_class: str, of: str) -> Mapping[str, Any]:
    """Returns the defaults of the parameters of a method, by name; the method may be inherited.

    Raises ValueError if there is no such class or method.
    """
    definition = _definition(pipeline_class)
    for method in definition.body:
        if isinstance(method, ast.FunctionDef) and method.name == of:
            return dict(_defaults(method.args))
    for base in definition.bases:
        if isinstance(base, ast.Name) and base.id != "DiffusionPipeline" and base.id.endswith("Pipeline"):
            return arguments_of(base.id, of)
    raise ValueError(f"{pipeline_class} of diffusers has no {of} of its own")


def _defaults(arguments: ast.arguments) -> Iterator[tuple[str, Any]]:
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)][1:]
    num_required = len(names) - len(arguments.defaults)
    values: list[ast.expr | None] = [*[None] * num_required, *arguments.defaults]
    names += [argument.arg for argument in arguments.kwonlyargs]
    values += arguments.kw_defaults
    for name, value in zip(names, values, strict=True):
        yield name, REQUIRED if value is None else _literal(value)


def _literal(value: ast.expr) -> Any:
    """Returns the value of a literal; None for other expressions."""
    try:
        return ast.literal_eval(value)
    except ValueError:
        return None


def _definition(pipeline_class: str) -> ast.ClassDef:
    file = pipeline_files().get(pipeline_class)
    if file is None:
        raise ValueError("the installed diffusers has no class of that name")
    nodes = ast.parse(file.read_text(encoding="utf-8")).body
    return next(node for node in nodes if isinstance(node, ast.ClassDef) and node.name == pipeline_class)


@cache
def pipeline_files() -> Mapping[str, Path]:
    """Returns the file of each pipeline class."""
    files = sorted(pipelines_folder().glob("**/pipeline*.py"))
    return {name: file for file in files for name in _CLASS.findall(file.read_text(encoding="utf-8"))}


def pipelines_folder() -> Path:
    return diffusers_folder() / "pipelines"


def diffusers_folder() -> Path:
    """Returns the folder of diffusers' sources."""
    spec = find_spec("diffusers")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent

"""Finds what runs a pipeline's text encoders: methods, from their source, or blocks, which declare what they need.

So pipelines need not be listed by name.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Collection, Iterator
from functools import cache
from typing import Any

from diffusers import ModularPipeline

from deployments.stages.modular import Replace, encoding_blocks, replace_blocks

Method = Callable[..., Any]
_NOT_ENCODING = frozenset({"check_inputs", "maybe_free_model_hooks", "__call__"})


def encoding_names(pipe: Any, encoders: frozenset[str]) -> tuple[str, ...]:
    """Returns the names of a pipeline's methods, or blocks, that use one of these components and no VAE."""
    if isinstance(pipe, ModularPipeline):
        return tuple(encoding_blocks(pipe._blocks, encoders))
    pipeline_class: Any = type(pipe)
    return encoding_methods(pipeline_class, encoders)


def replace_encoding(pipe: Any, names: Collection[str], replace: Replace) -> None:
    """Replaces the named methods, or blocks, in place, so pass a copy of the pipeline."""
    if isinstance(pipe, ModularPipeline):
        replace_blocks(pipe, names, replace)
    else:
        vars(pipe).update({name: replace(name, getattr(pipe, name)) for name in names})


@cache
def encoding_methods(pipeline_class: Any, encoders: frozenset[str]) -> tuple[str, ...]:
    """Returns the methods that `__call__` calls and that, directly or not, use one of `encoders` and no VAE.

    Methods that use the VAE too prepare latents; SDXL's use a text encoder only to know what is offloaded. An
    encoder that `__call__` calls directly counts as a method of the encoder's name (LTX-2's connectors).
    """
    called = dict.fromkeys(_own_names(pipeline_class.__call__))
    reached = {name: _reached(pipeline_class, name) for name in called if name not in _NOT_ENCODING | encoders}
    methods = [name for name, touched in reached.items() if touched & encoders and "vae" not in touched]
    return (*methods, *sorted(set(_called_components(pipeline_class.__call__, encoders))))


def _reached(pipeline_class: Any, name: str, seen: frozenset[str] = frozenset()) -> frozenset[str]:
    """Returns the attributes of `self` that a method uses, directly or through methods that it calls."""
    method = inspect.getattr_static(pipeline_class, name, None)
    method = getattr(method, "__func__", method)  # of a static method
    if name in seen or not inspect.isfunction(method):
        return frozenset({name})
    return frozenset().union(*(_reached(pipeline_class, other, seen | {name}) for other in _own_names(method)))


@cache
def _own_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Returns the attributes of `self` that a function uses, in the order of the source."""
    nodes = [node for node in ast.walk(_tree(function)) if isinstance(node, ast.Attribute) and _is_own(node)]
    nodes.sort(key=lambda node: (node.lineno, node.col_offset))
    return tuple(dict.fromkeys(node.attr for node in nodes))


def _called_components(function: Callable[..., Any], encoders: Collection[str]) -> Iterator[str]:
    for node in ast.walk(_tree(function)):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and _is_own(called) and called.attr in encoders:
            yield called.attr


def _is_own(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == "self"


@cache
def _tree(function: Callable[..., Any]) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))

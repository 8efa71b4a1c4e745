"""Finds a component's class, and the packages it needs that are not installed, by reading diffusers' sources.

Only `import_class` imports anything.
"""

import importlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

from deployments.families.sources import diffusers_folder

_DUMMY = re.compile(r"class (\w+)\(metaclass=DummyObject\):\s+_backends = \[(.*?)\]")
"""diffusers' placeholder for a class whose packages are missing; it lists the packages."""
_MODULES = {"opencv": "cv2", "onnx": "onnxruntime"}
"""Module names by diffusers' names of packages, where the two differ."""
_DISTRIBUTIONS = {"opencv": "opencv-python", "onnx": "onnxruntime"}
"""pip's names by diffusers' names of packages, where the two differ."""


def library_of(package: str) -> str:
    """Returns a component's library. package: from its entry in model_index.json, which is the name of a pipeline
    of diffusers if only that pipeline has the class (LTX-2's vocoder)."""
    return "diffusers" if _is_pipeline(package) else package


def import_class(entry: Sequence[str]) -> Any:
    """Imports a component's class. entry: [package, class] from a checkpoint's index. Raises AttributeError."""
    package, class_name = entry
    module = f"diffusers.pipelines.{package}" if _is_pipeline(package) else package
    return getattr(importlib.import_module(module), class_name)


def is_public(class_name: str, package: str = "diffusers") -> bool:
    """Whether the installed diffusers, or one of its pipeline packages, has a class of that name."""
    return f'"{class_name}"' in _names(package)


def missing_packages(class_name: str) -> list[str]:
    """Returns the packages that a class of diffusers needs and that are not installed, by pip's names."""
    needed = _needs().get(class_name, ())
    return [_DISTRIBUTIONS.get(name, name) for name in needed if find_spec(_MODULES.get(name, name)) is None]


def describe_missing(class_name: str) -> str | None:
    """Returns a sentence on the missing packages of a class; None if there are none."""
    missing = missing_packages(class_name)
    if not missing:
        return None
    names = " and ".join(missing)
    return f"diffusers' {class_name} needs {names}, not installed here: `pip install {' '.join(missing)}`"


@cache
def _is_pipeline(package: str) -> bool:
    return package.isidentifier() and (diffusers_folder() / "pipelines" / package / "__init__.py").is_file()


@cache
def _names(package: str) -> str:
    folder = diffusers_folder() / "pipelines" / package if _is_pipeline(package) else diffusers_folder()
    return (folder / "__init__.py").read_text(encoding="utf-8")


@cache
def _needs() -> Mapping[str, tuple[str, ...]]:
    needs: dict[str, tuple[str, ...]] = {}
    for file in (diffusers_folder() / "utils").glob("dummy_*.py"):
        for name, needed in _DUMMY.findall(file.read_text(encoding="utf-8")):
            needs[name] = (*needs.get(name, ()), *re.findall(r"\w+", needed))
    return needs

"""Where a component's class is, and which packages it needs that are not installed: diffusers' sources tell.

Nothing is imported to tell it.
"""

import importlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

from deployments.families.calls import diffusers_folder

_DUMMY = re.compile(r"class (\w+)\(metaclass=DummyObject\):\s+_backends = \[(.*?)\]")
"""What stands in for a class whose packages are missing, and says which they are."""
_MODULES = {"opencv": "cv2", "onnx": "onnxruntime"}
"""By diffusers' names for them, where those are not the module's."""
_DISTRIBUTIONS = {"opencv": "opencv-python", "onnx": "onnxruntime"}
"""As above, and not pip's."""


def library_of(package: str) -> str:
    """Of a component's entry in model_index.json, or "diffusers" where one of its pipelines has a class for itself
    (LTX-2's vocoder)."""
    return "diffusers" if _is_pipeline(package) else package


def import_class(entry: Sequence[str]) -> Any:
    """entry: package and class, as a checkpoint's index says of a component. Raises AttributeError."""
    package, class_name = entry
    module = f"diffusers.pipelines.{package}" if _is_pipeline(package) else package
    return getattr(importlib.import_module(module), class_name)


def is_public(class_name: str, package: str = "diffusers") -> bool:
    """Whether the installed diffusers, or that package of its pipelines, has a class of that name."""
    return f'"{class_name}"' in _names(package)


def missing_packages(class_name: str) -> list[str]:
    """By pip's names."""
    needed = _needs().get(class_name, ())
    return [_DISTRIBUTIONS.get(name, name) for name in needed if find_spec(_MODULES.get(name, name)) is None]


def describe_missing(class_name: str) -> str | None:
    """A sentence, if some are."""
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

"""Packages that a class of diffusers needs and that are not installed: its sources tell, nothing is imported."""

import re
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec

from deployments.families.calls import diffusers_folder

_DUMMY = re.compile(r"class (\w+)\(metaclass=DummyObject\):\s+_backends = \[(.*?)\]")
"""What stands in for a class whose packages are missing, and says which they are."""
_MODULES = {"opencv": "cv2", "onnx": "onnxruntime"}
"""By diffusers' names for them, where those are not the module's."""
_DISTRIBUTIONS = {"opencv": "opencv-python", "onnx": "onnxruntime"}
"""As above, and not pip's."""


def is_public(class_name: str) -> bool:
    """Whether the installed diffusers has a class of that name."""
    return f'"{class_name}"' in _names()


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
def _names() -> str:
    return (diffusers_folder() / "__init__.py").read_text(encoding="utf-8")


@cache
def _needs() -> Mapping[str, tuple[str, ...]]:
    needs: dict[str, tuple[str, ...]] = {}
    for file in (diffusers_folder() / "utils").glob("dummy_*.py"):
        for name, needed in _DUMMY.findall(file.read_text(encoding="utf-8")):
            needs[name] = (*needs.get(name, ()), *re.findall(r"\w+", needed))
    return needs

"""Test parameters, some of which run only with --thorough."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def usually(values: Iterable[Any], is_usual: Callable[[Any], bool]) -> list[Any]:
    """Returns all values, tuples for several arguments; those that are not usual are marked `thorough`."""
    return [value if is_usual(value) else _thorough(value) for value in values]


def _thorough(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.thorough)

"""`--quick`, for the inner loop: tests that need no torch and start no processes."""

import ast
from pathlib import Path

import pytest

from tests.imports import imports
from tests.lifetimes import fixtures_of

HEAVY = frozenset({"torch", "diffusers", "subprocess", "multiprocessing", "ray"})
SLOW_FIXTURES = frozenset({"ray_cluster", "browser"})


def is_quick_file(path: Path) -> bool:
    return HEAVY.isdisjoint(name.partition(".")[0] for name in imports(ast.parse(path.read_text())))


def is_quick(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is None and not SLOW_FIXTURES & fixtures_of(item)

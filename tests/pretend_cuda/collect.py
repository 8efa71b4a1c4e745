"""Collects the tests that run on the simulated device: those that need a GPU and, a second time, some of the
CPU's."""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.pretend_cuda.items import Group, Pretended
from tests.pretend_cuda.sweep import is_for_gpu, is_swept

ALL_STAGES = ("-p", "tests.pretend_cuda.all_stages")
IS_FOR_CUDA = torch.version.cuda is not None or torch.version.hip is not None
"""Whether torch itself is built for CUDA or ROCm, which leaves no place for a simulated one."""
HAS_PRETENDED = "PRETEND_CUDA" in os.environ
"""Whether this process already runs a group of tests on the simulated device."""


class Groups:
    """The groups of tests on the simulated device, by name; each has its own process."""

    def __init__(self) -> None:
        self._groups: dict[str, Group] = {}

    def take_over(self, items: list[pytest.Item], *, is_wanted: bool, is_thorough: bool) -> None:
        """Changes items in place: tests that need a GPU run on the simulated one, and those of the sweep run there
        too.

        is_wanted: if False, tests that need a GPU are skipped. They are also skipped if torch has its own CUDA,
        where a real GPU runs what it can.
        """
        if HAS_PRETENDED:
            return
        if IS_FOR_CUDA or not is_wanted:
            _skip(
                items, "torch has a CUDA of its own: nothing is pretended" if IS_FOR_CUDA else "--no-pretend-gpu"
            )
            return
        items[:] = [made for item in items for made in self._made_of(item, is_thorough)]

    def close(self) -> None:
        for group in self._groups.values():
            group.close()

    def _made_of(self, item: pytest.Item, is_thorough: bool) -> Iterator[pytest.Item]:
        options = ("--thorough",) if is_thorough else ()
        if is_for_gpu(item, is_thorough=is_thorough):
            yield self._pretended(item, item.name, self._group(_part(item), *options))
            return
        yield item
        if is_swept(item, is_thorough=is_thorough):
            group = self._group(f"every stage, {_part(item)}", *ALL_STAGES, *options)
            yield self._pretended(item, f"{item.name} on a pretended GPU", group)

    def _pretended(self, item: pytest.Item, name: str, group: Group) -> pytest.Item:
        made: pytest.Item = Pretended.from_parent(item.parent, name=name, origin=item, group=group)
        return made

    def _group(self, part: str, *options: str) -> Group:
        name = f"pretended GPU, {part}"
        return self._groups.setdefault(name, Group(name, options))


def _skip(items: list[pytest.Item], reason: str) -> None:
    missing = {"pretended_gpu"} if torch.cuda.is_available() else {"gpu", "pretended_gpu"}
    for item in items:
        if missing & {mark.name for mark in item.iter_markers()}:
            item.add_marker(pytest.mark.skip(reason))


def _part(item: pytest.Item) -> str:
    return "on Ray" if "ray_cluster" in getattr(item, "fixturenames", ()) else "in one process"

"""Tiny checkpoints of all architectures except the families', which `test_tiny` tests in more detail."""

import hashlib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from deployments.checkpoints.tiny.names import TINY_FAMILIES, TINY_MODULES
from deployments.checkpoints.tiny.write import write_tiny_checkpoint
from tests.deployments import plain
from tests.deployments.recorded import load_tiny
from tests.deployments.tiny_calls import TINY_CALLS

MAX_CHECKPOINT_BYTES = 24_000_000
QUICK = frozenset({"flux2-klein", "ltx2", "z-image"})
"""Checkpoints tested without --thorough."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "tiny" in metafunc.fixturenames:
        is_thorough = metafunc.config.getoption("--thorough")
        others = [name for name in TINY_MODULES if name not in TINY_FAMILIES]
        metafunc.parametrize("tiny", [name for name in others if is_thorough or name in QUICK])


def draw(name: str, prompt: str) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings(action="ignore"):
        arguments = {"prompt": prompt, **TINY_CALLS[name], "generator": generator, "output_type": "np"}
        return np.asarray(plain.draw(load_tiny(name), **arguments)[0])


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_plain_diffusers_draws_another_picture_for_another_prompt(tiny: str) -> None:
    fox, sea = draw(tiny, "a red fox"), draw(tiny, "a blue sea")
    assert np.isfinite(fox).all()
    assert fox.std() > 0.05
    assert np.abs(fox - sea).max() > 1e-3


def test_two_writes_are_equal_byte_for_byte_and_small(tiny: str, tmp_path: Path) -> None:
    for name in ("one", "other"):
        write_tiny_checkpoint(tiny, tmp_path / name)
    assert digests(tmp_path / "one") == digests(tmp_path / "other")
    assert sum(path.stat().st_size for path in (tmp_path / "one").rglob("*")) < MAX_CHECKPOINT_BYTES


def test_each_has_a_call_to_be_tried_with() -> None:
    assert set(TINY_CALLS) == set(TINY_MODULES)

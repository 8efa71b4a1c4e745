"""Forwards of two requests' pipelines: merged, each gets what it gets alone."""

import json
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from deployments.checkpoints.source import fetch_checkpoint
from deployments.engine.merge import RULES, Merger, num_samples, split
from tests.deployments.recorded import Recorded, record

LONG_PROMPT = "two blue whales under a paper moon, in the manner of an old woodcut"
TOLERANCE = 2e-5
GUIDANCE = {"guidance_scale": 2.5}
MERGED = {
    "aura-flow": GUIDANCE,
    "bria": GUIDANCE,
    "chroma": GUIDANCE,
    "cogview3": GUIDANCE,
    "cogview4": GUIDANCE,
    "flux": GUIDANCE,
    "flux-fill": GUIDANCE,
    "flux-kontext": GUIDANCE,
    "flux2": GUIDANCE,
    "flux2-klein": GUIDANCE,
    "flux3": {},
    "flux3-distilled": {},
    "hunyuan-video": GUIDANCE,
    "ideogram4": GUIDANCE,
    "krea2": GUIDANCE,
    "lcm": GUIDANCE,
    "longcat": GUIDANCE,
    "ltx-video": GUIDANCE,
    "lumina2": GUIDANCE,
    "ovis": GUIDANCE,
    "pixart-alpha": GUIDANCE,
    "qwen-image": {"true_cfg_scale": 2.5},
    "sana": GUIDANCE,
    "sana-video": GUIDANCE,
    "sana-sprint": {"num_inference_steps": 2} | GUIDANCE,
    "sd15": GUIDANCE,
    "sd35": GUIDANCE,
    "sdxl": GUIDANCE,
    "wan22-a14b": GUIDANCE,
    "wan22-5b": GUIDANCE,
    "wan21-i2v": GUIDANCE,
    "z-image": GUIDANCE,
}
"""How the guidance of the second request differs, by tiny checkpoint."""
POSITIONED = frozenset({"ideogram4"})
"""Checkpoints whose samples each have their own positions, so that sizes of equal numbers of tokens merge."""
QUICK = frozenset(
    {"ideogram4", "chroma", "cogview4", "flux2", "flux2-klein", "flux3", "lumina2", "ltx-video", "sana", "z-image"}
)
"""Checkpoints tested without --thorough: those whose inputs differ from the others'."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "merged" in metafunc.fixturenames:
        is_thorough = metafunc.config.getoption("--thorough")
        metafunc.parametrize("merged", [name for name in MERGED if is_thorough or name in QUICK])


@torch.no_grad()
def test_two_requests_get_together_what_each_gets_alone(merged: str) -> None:
    wide, tall = ({"width": 128}, {"height": 128}) if merged in POSITIONED else ({}, {})
    changes = {"num_inference_steps": 3} | MERGED[merged] | tall
    one, other = record(merged, **wide), record(merged, LONG_PROMPT, seed=1, **changes)
    pairs = list(mergeable(one, other))
    assert pairs, "they never meet"
    for pair in pairs:
        group = [*pair, pair[0]]
        together = Merger(type(pair[0].model).__name__).merge([forward.inputs for forward in group])
        output = pair[0].model(**together, return_dict=False)
        parts = split(output, [num_samples(forward.inputs) for forward in group])
        for part, forward in zip(parts, group, strict=True):
            for got, alone in zip(tree_leaves(part), tree_leaves(forward.output), strict=True):
                torch.testing.assert_close(got, alone, atol=TOLERANCE, rtol=0)


def test_portrait_and_landscape_never_meet(merged: str) -> None:
    wide, tall = record(merged, width=128), record(merged, height=128)
    assert bool(list(mergeable(wide, tall))) == (merged in POSITIONED)


def test_every_rule_is_of_a_model_that_is_tried() -> None:
    folders = [fetch_checkpoint(f"tiny://{name}", ()) for name in MERGED]
    indices = [json.loads((folder / "model_index.json").read_text()) for folder in folders]
    assert {index[part][1] for index in indices for part in ("unet", "transformer") if part in index} == set(RULES)


def mergeable(one: list[Recorded], other: list[Recorded]) -> Iterator[tuple[Recorded, Recorded]]:
    """Yields pairs of forwards that may merge, each kind once."""
    seen: set[Any] = set()
    for pair in product(one, other):
        first, second = (
            (forward.component, Merger(type(forward.model).__name__).signature(forward.inputs)) for forward in pair
        )
        if first == second and (first, pair[0].layout, pair[1].layout) not in seen:
            seen.add((first, pair[0].layout, pair[1].layout))
            yield pair

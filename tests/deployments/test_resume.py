"""The denoise stage's deployment yields the journal that a request is resumed from, and resumes it."""

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.answers import (
    NOTHING_PREPARED,
    Conditioning,
    Denoised,
    JournalPart,
    PartialDenoised,
    Progress,
    StepsSaved,
)
from deployments.config.transformer import TransformerConfig
from deployments.options.resume import PART_SUFFIX
from deployments.replica import request_events
from deployments.request import StreamOptions
from deployments.stages.loop.journal_file import read_journal
from deployments.transformer import Transformer
from tests.deployments.test_transformer import MODEL, build_request, conditioning

__all__ = ["conditioning"]

NUM_STEPS = 20
HEARS_ALL = StreamOptions(wants_progress=True, num_partial_images=3)


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    config = TransformerConfig.model_validate({"resume": {"every_steps": 4, "every_s": 0.0}})
    return Transformer(MODEL, config)


async def _items(transformer: Transformer, *given: Any) -> list[Any]:
    return [item async for item in transformer.denoise(*given)]


def denoise(transformer: Transformer, conditioning: Conditioning, *more: Any) -> list[Any]:
    return asyncio.run(_items(transformer, conditioning, build_request(NUM_STEPS), HEARS_ALL, *more))


def num_forwards(transformer: Transformer) -> int:
    sizes = transformer._stage.engine.queue.stats().batch_sizes
    return sum(size * number for size, number in sizes.items())


def of(items: list[Any], kind: type) -> list[Any]:
    return [item for item in items if isinstance(item, kind)]


def before_the_last(items: list[Any]) -> list[Any]:
    """Returns the items before the last part of the journal."""
    return items[: max(i for i, item in enumerate(items) if isinstance(item, JournalPart))]


def test_a_caller_resumes_it_from_what_it_was_given(
    transformer: Transformer, conditioning: Conditioning, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_events, "PROGRESS_PERIOD_S", 0.0)
    whole = denoise(transformer, conditioning)
    announced = [whole[i + 1] for i, item in enumerate(whole) if isinstance(item, StepsSaved)]
    parts = of(whole, JournalPart)
    assert parts
    assert announced == parts
    assert [told.num_steps for told in of(whole, StepsSaved)] == [part.num_steps for part in parts]
    assert all(later.num_steps - part.num_steps >= 4 for part, later in pairwise(parts))
    before, last = num_forwards(transformer), parts[-1].num_steps
    resumed = denoise(transformer, conditioning, NOTHING_PREPARED, None, None, *parts)
    assert num_forwards(transformer) - before == NUM_STEPS - last
    assert torch.equal(resumed[-1].latents, whole[-1].latents)
    assert [told.step for told in of(resumed, Progress)] == list(range(last + 1, NUM_STEPS + 1))
    assert all(told.eta_s is not None for told in of(resumed, Progress))
    [denoised], [unbroken] = of(resumed, Denoised), of(whole, Denoised)
    assert denoised.forwards == unbroken.forwards
    is_told_again = {told.partial_image_index for told in of(before_the_last(whole), PartialDenoised)}
    assert not is_told_again.intersection(told.partial_image_index for told in of(resumed, PartialDenoised))


def test_files_keep_it_where_the_caller_says_so(
    transformer: Transformer, conditioning: Conditioning, tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/0"
    whole = denoise(transformer, conditioning, NOTHING_PREPARED, None, url)
    assert of(whole, JournalPart) == of(whole, StepsSaved) == []
    kept = read_journal(url)
    assert len(kept) == len(list(tmp_path.glob(f"0-*{PART_SUFFIX}"))) > 0
    before = num_forwards(transformer)
    resumed = denoise(transformer, conditioning, NOTHING_PREPARED, None, url)
    assert num_forwards(transformer) - before == NUM_STEPS - kept[-1].num_steps
    assert torch.equal(resumed[-1].latents, whole[-1].latents)

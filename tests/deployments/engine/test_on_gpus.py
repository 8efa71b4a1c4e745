"""Ranks on GPUs, in one process: on one GPU, and each on its own GPU over NCCL."""

import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.ranks.place import Place
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.engine.step_queue import Cancelled
from deployments.errors import OutOfDeviceMemory
from deployments.families import FAMILIES
from deployments.request import GenerationRequest
from deployments.stages import load_stage
from tests.deployments.memory.tiny_request import build_request

pytestmark = pytest.mark.gpu
SOON_S = 60.0


@cache
def embeds(family: str) -> Any:
    tokens = 64 if FAMILIES[family].max_sequence_length else None
    config = EncoderConfig(max_sequence_length=tokens)
    return load_stage("encode", build_model(family), config).encode(build_request(family))


def build_steps(family: str) -> GenerationRequest:
    """Returns a request with enough steps for a partial image, and for the equations that UniPC solves at its
    third."""
    return replace(build_request(family), num_inference_steps=3)


def build_model(family: str) -> ModelConfig:
    return ModelConfig(name="tiny", checkpoint=f"tiny://{family}", family=family)


class ShardGroup:
    """A group with a rank for each of the given GPUs."""

    def __init__(self, family: str, gpus: tuple[int, ...], **settings: Any) -> None:
        self.family, self.gpus, num_ranks = family, gpus, len(gpus)
        self.model = build_model(family)
        self.config = TransformerConfig(num_gpus=1, shards=num_ranks, **settings)
        self.head, *others = [self._load(rank) for rank in range(num_ranks)]
        if not others:
            self.head.connect(None, pytest.fail)
            return
        rendezvous = self.head.open_rendezvous("127.0.0.1", [Place("node", str(gpu)) for gpu in gpus])
        self.backend = rendezvous.backend
        with ThreadPoolExecutor(num_ranks) as threads:
            joining = [threads.submit(rank.connect, rendezvous, pytest.fail) for rank in (self.head, *others)]
            for joined in joining:
                joined.result(SOON_S)

    def draw(self, **on: Any) -> torch.Tensor:
        seat = self.head.join()
        try:
            latents: torch.Tensor = self.head.denoise(
                seat, embeds(self.family), build_steps(self.family), **{"on_step": lambda *_: None, **on}
            ).latents
        finally:
            self.head.leave(seat)
        return latents

    def cancel_after_the_first_step(self) -> None:
        seat = self.head.join()
        with pytest.raises(Cancelled):
            self.head.denoise(
                seat,
                embeds(self.family),
                build_steps(self.family),
                on_step=lambda *_: self.head.leave(seat),
            )

    def _load(self, rank: int) -> Any:
        with torch.cuda.device(self.gpus[rank]):
            if rank == 0:
                return load_stage("denoise", self.model, self.config)
            return load_stage("worker", self.model, self.config, rank)


Open = Callable[..., ShardGroup]


@pytest.fixture
def open_group() -> Iterator[Open]:
    opened: list[ShardGroup] = []

    def open_one(family: str, gpus: tuple[int, ...], **settings: Any) -> ShardGroup:
        if max(gpus) >= torch.cuda.device_count():
            pytest.skip(f"needs {max(gpus) + 1} GPUs")
        opened.append(ShardGroup(family, gpus, **settings))
        return opened[-1]

    yield open_one
    for group in opened:
        group.head.close()


@pytest.mark.parametrize(
    ("family", "gpus", "backend"),
    [
        *((family, (0, 1), "nccl") for family in FAMILIES),
        *((family, (0, 0, 0), "gloo") for family in ("flux", "sdxl", "wan")),
        ("flux", (0, 0), "gloo"),
    ],
)
def test_ranks_draw_what_one_does(open_group: Open, family: str, gpus: tuple[int, ...], backend: str) -> None:
    expected = open_group(family, (0,)).draw()
    group = open_group(family, gpus)
    assert group.backend == backend
    assert torch.equal(group.draw(), expected)


@pytest.mark.parametrize("gpus", [(0,), (0, 0), (0, 1)])
def test_a_request_that_is_cancelled_leaves_the_next_as_it_would_be(
    open_group: Open, gpus: tuple[int, ...]
) -> None:
    group = open_group("flux", gpus)
    expected = group.draw()
    group.cancel_after_the_first_step()
    assert torch.equal(group.draw(), expected)


@pytest.mark.parametrize("gpus", [(0,), (0, 1)])
def test_partial_latents_arrive_on_the_host(open_group: Open, gpus: tuple[int, ...]) -> None:
    partials: list[torch.Tensor] = []
    latents = open_group("flux", gpus).draw(
        num_partial_images=1, on_partial=lambda _index, arguments: partials.append(arguments.latents)
    )
    assert [(partial.device.type, partial.shape) for partial in partials] == [("cpu", latents.shape)]


@pytest.mark.parametrize(
    "settings", [{"quantization": "nf4"}, {"offload": "group"}, {"time_sharing": True}], ids=str
)
def test_ranks_of_two_gpus_need_less_memory_in_the_same_ways(
    open_group: Open, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # the folder of the leases' lock files
    expected = open_group("flux", (0,), **{k: v for k, v in settings.items() if k == "quantization"}).draw()
    assert torch.equal(open_group("flux", (0, 1), **settings).draw(), expected)


def test_requests_side_by_side_on_two_gpus_draw_what_they_draw_alone(open_group: Open) -> None:
    group = open_group("sdxl", (0, 1))
    expected = group.draw()
    for latents in draw_four(group):
        torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)  # merged forwards round differently


@pytest.mark.parametrize("device_map", ["auto", "balanced"])
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_map_over_two_gpus_draws_what_one_does(open_group: Open, device_map: str) -> None:
    expected = open_group("flux", (0,)).draw()
    model, memory = build_model("flux"), {"0": "6MiB", "1": "100MiB"}
    config = TransformerConfig(num_gpus=2, device_map=device_map, max_memory=memory)
    stage = load_stage("denoise", model, config)
    stage.connect(None, pytest.fail)
    latents = stage.denoise(stage.join(), embeds("flux"), build_steps("flux"), on_step=lambda *_: None).latents
    [rank] = stage.stats().ranks
    stage.close()
    assert set(rank.device_map.values()) == {"0", "1"}
    assert torch.equal(latents, expected)


class Cap:
    """A cap on the memory that this process may use of the first GPU."""

    def peak_bytes(self, work: Callable[[], object]) -> int:
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated()

    def set(self, num_bytes: int) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(num_bytes / torch.cuda.get_device_properties(0).total_memory)


@pytest.fixture
def cap() -> Iterator[Cap]:
    yield Cap()
    torch.cuda.set_per_process_memory_fraction(1.0)


def draw_four(group: ShardGroup) -> list[torch.Tensor]:
    with ThreadPoolExecutor(4) as threads:
        drawing = [threads.submit(group.draw) for _ in range(4)]
        return [drawn.result(SOON_S) for drawn in drawing]


@pytest.mark.pretended_gpu  # its peaks are the same every time
def test_what_is_too_much_merged_runs_alone_and_no_request_fails(open_group: Open, cap: Cap) -> None:
    group = open_group("sdxl", (0,), batch_wait_ms=1000)
    expected = group.draw()
    alone = cap.peak_bytes(group.draw)
    merged = cap.peak_bytes(lambda: draw_four(group))
    assert merged > alone
    cap.set((alone + merged) // 2)
    for latents in draw_four(group):
        torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.pretended_gpu
def test_a_call_that_is_out_of_memory_fails_alone_and_leaves_nothing_there(open_group: Open, cap: Cap) -> None:
    group = open_group("flux", (0,))
    expected = group.draw()
    gc.collect()
    before = torch.cuda.memory_allocated()
    alone = cap.peak_bytes(group.draw)
    cap.set((before + alone) // 2)
    with pytest.raises(OutOfDeviceMemory, match="out of memory"):
        group.draw()
    deadline = time.monotonic() + 10
    while torch.cuda.memory_allocated() != before and time.monotonic() < deadline:
        time.sleep(0.05)  # a thread may still be unwinding from the error
        gc.collect()
    assert torch.cuda.memory_allocated() == before
    cap.set(2 * alone)
    assert torch.equal(group.draw(), expected)

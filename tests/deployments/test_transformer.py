"""The denoise stage's deployment, as a plain object without a cluster."""

import asyncio
import gc
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from deployments.answers import Conditioning, DecodeArguments, Denoised, PartialDenoised, Progress
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.engine.queue_stats import StepQueueStats
from deployments.errors import NotBegun, OutOfTime
from deployments.options.qos import Qos
from deployments.options.resume import ResumeConfig
from deployments.options.step_cache import StepCacheConfig
from deployments.replica import request_events
from deployments.request import GenerationRequest, Prompt, StreamOptions
from deployments.stages import load_stage
from deployments.transformer import Transformer

MODEL = ModelConfig(name="tiny", checkpoint="tiny://flux", family="flux")
PROMPT = Prompt("a red fox", None, is_guided=False)
PROGRESS = StreamOptions(wants_progress=True)
NUM_THREADS = 4
NO_JOURNAL = ResumeConfig(every_steps=None)
ENDLESS = 10_000
"""Number of steps: minutes of work, which a test that cancels must not wait for."""


def build_request(num_inference_steps: int = 3, seed: int = 5) -> GenerationRequest:
    return GenerationRequest(
        PROMPT,
        width=64,
        height=48,
        num_frames=1,
        num_inference_steps=num_inference_steps,
        guidance_scale=3.5,
        true_cfg_scale=1.0,
        seed=seed,
        output_format="png",
        output_compression=100,
        fps=16,
    )


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    """A deployment without a journal, whose parts would come between the asserted items on a busy machine."""
    return Transformer(MODEL, TransformerConfig(max_ongoing_requests=NUM_THREADS, resume=NO_JOURNAL))


@pytest.fixture(scope="module")
def conditioning() -> Conditioning:
    encoding = load_stage("encode", MODEL, EncoderConfig(max_sequence_length=32))
    return Conditioning(encoding.encode(build_request()), 1.0)


async def collect(transformer: Transformer, conditioning: Conditioning, request: GenerationRequest) -> list[Any]:
    """Returns all items of the stream, with latents in place of DecodeArguments."""
    return await _items(transformer.denoise(conditioning, request, PROGRESS))


async def _items(stream: AsyncIterator[Any]) -> list[Any]:
    return [item.latents if isinstance(item, DecodeArguments) else item async for item in stream]


async def cancel_after_the_first_step(transformer: Transformer, conditioning: Conditioning) -> None:
    stream = transformer.denoise(conditioning, build_request(ENDLESS), PROGRESS)
    assert isinstance(await anext(stream), Progress)
    await stream.aclose()  # type: ignore[attr-defined]


async def queue_stats(transformer: Transformer) -> StepQueueStats:
    return (await transformer.stats()).queue


async def wait_until_idle(transformer: Transformer) -> StepQueueStats:
    while (queue := await queue_stats(transformer)).num_running or queue.num_waiting:
        await asyncio.sleep(0.001)
    return queue


def test_progress_comes_first_then_the_summary_then_the_latents(
    transformer: Transformer, conditioning: Conditioning
) -> None:
    *progress, denoised, latents = asyncio.run(collect(transformer, conditioning, build_request()))
    assert progress
    assert all(isinstance(item, Progress) and item.num_steps == 3 for item in progress)
    steps = [item.step for item in progress]
    assert steps == sorted(set(steps))
    assert isinstance(denoised, Denoised)
    assert isinstance(latents, torch.Tensor)


def test_nobody_gets_progress_who_did_not_ask(transformer: Transformer, conditioning: Conditioning) -> None:
    async def run() -> list[type]:
        return [type(item) async for item in transformer.denoise(conditioning, build_request())]

    assert asyncio.run(run()) == [Denoised, DecodeArguments]


def test_the_time_left_is_known_once_a_step_is_done(
    transformer: Transformer, conditioning: Conditioning, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_events, "PROGRESS_PERIOD_S", 0.0)
    first, *later, last = [
        item
        for item in asyncio.run(collect(transformer, conditioning, build_request(6)))
        if isinstance(item, Progress)
    ]
    assert (first.step, first.eta_s) == (0, None)
    assert [progress.step for progress in later] == [1, 2, 3, 4, 5]
    assert all(progress.eta_s > 0 for progress in later)
    assert (last.step, last.eta_s) == (6, 0.0)


def test_partial_latents_come_announced_and_in_order(transformer: Transformer, conditioning: Conditioning) -> None:
    async def run() -> list[Any]:
        stream = transformer.denoise(conditioning, build_request(8), StreamOptions(num_partial_images=3))
        return await _items(stream)

    *partials, denoised, latents = asyncio.run(run())
    assert partials[::2] == [PartialDenoised(0), PartialDenoised(1), PartialDenoised(2)]
    assert all(partial.shape == latents.shape and partial.is_contiguous() for partial in partials[1::2])
    assert isinstance(denoised, Denoised)
    far, near, nearest = (float((partial - latents).norm()) for partial in partials[1::2])
    assert far > near > nearest > 0


def test_the_summary_passes_on_what_the_encoder_said(transformer: Transformer, conditioning: Conditioning) -> None:
    told = replace(conditioning, encode_ms=12.5)
    *_, denoised, _ = asyncio.run(collect(transformer, told, build_request()))
    assert denoised.encode_ms == 12.5
    assert denoised.queue_ms >= 0
    assert denoised.denoise_ms > 0


def test_latents_are_cpu_tensors_that_can_be_sent_without_a_copy(
    transformer: Transformer, conditioning: Conditioning
) -> None:
    *_, latents = asyncio.run(collect(transformer, conditioning, build_request()))
    assert latents.shape == (1, 16, 48 // 8, 64 // 8)
    assert latents.device.type == "cpu"
    assert latents.is_contiguous()


def test_the_seed_alone_decides_the_latents(transformer: Transformer, conditioning: Conditioning) -> None:
    one, again, other = (
        asyncio.run(collect(transformer, conditioning, build_request(seed=seed)))[-1] for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.allclose(one, other, atol=1e-2)


def test_requests_at_once_of_different_lengths_give_what_each_gives_alone(
    transformer: Transformer, conditioning: Conditioning
) -> None:
    """The lengths differ so that some requests join and leave while others go on. Batches round differently."""
    requests = [build_request(4 + 2 * i, seed=i) for i in range(NUM_THREADS)]
    alone = [asyncio.run(collect(transformer, conditioning, request))[-1] for request in requests]

    async def at_once() -> list[list[Any]]:
        return await asyncio.gather(*(collect(transformer, conditioning, request) for request in requests))

    together = [items[-1] for items in asyncio.run(at_once())]
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def test_a_step_cache_counts_as_its_requests_need_until_its_seat_is_free(
    transformer: Transformer, conditioning: Conditioning
) -> None:
    request = replace(build_request(ENDLESS), step_cache=StepCacheConfig())

    async def run() -> int:
        stream = transformer.denoise(conditioning, request, PROGRESS)
        async for item in stream:
            if isinstance(item, Progress) and item.step:
                break
        retained_bytes = transformer._stage.engine.queue.retained_bytes()
        await stream.aclose()  # type: ignore[attr-defined]
        return retained_bytes

    tokens, channels, float32 = (64 // 16) * (48 // 16), 64, 4
    assert asyncio.run(run()) == 2 * tokens * channels * float32  # order 1 keeps two predictions
    assert transformer._stage.engine.queue.retained_bytes() == 0


def test_requests_at_once_share_forwards(transformer: Transformer, conditioning: Conditioning) -> None:
    async def at_once() -> tuple[StepQueueStats, StepQueueStats]:
        before = await queue_stats(transformer)
        await asyncio.gather(*(collect(transformer, conditioning, build_request(8, seed=i)) for i in range(4)))
        return before, await queue_stats(transformer)

    before, after = asyncio.run(at_once())
    assert after.num_micro_batches - before.num_micro_batches < 4 * 8


def test_a_caller_that_stops_listening_frees_its_seat_and_ends_its_forwards(
    transformer: Transformer, conditioning: Conditioning
) -> None:
    async def run() -> None:
        await cancel_after_the_first_step(transformer, conditioning)
        assert (await queue_stats(transformer)).num_seats == 0
        before = await wait_until_idle(transformer)
        await collect(transformer, conditioning, build_request(3))
        after = await queue_stats(transformer)
        assert after.num_micro_batches - before.num_micro_batches == 3

    asyncio.run(run())


def test_a_cancelled_task_frees_its_seat(transformer: Transformer, conditioning: Conditioning) -> None:
    async def run() -> None:
        before = await queue_stats(transformer)
        task = asyncio.create_task(collect(transformer, conditioning, build_request(ENDLESS)))
        while (await queue_stats(transformer)).num_micro_batches == before.num_micro_batches:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await queue_stats(transformer)).num_seats == 0

    asyncio.run(run())


def test_cancelled_requests_leave_their_threads_to_others(
    transformer: Transformer, conditioning: Conditioning
) -> None:
    """One more request than there are threads would wait forever if cancelled ones kept theirs."""

    async def run() -> Any:
        cancelled = (cancel_after_the_first_step(transformer, conditioning) for _ in range(NUM_THREADS))
        await asyncio.gather(*cancelled)
        return (await collect(transformer, conditioning, build_request(1)))[-1]

    assert isinstance(asyncio.run(run()), torch.Tensor)


def test_a_cancelled_request_leaves_no_complaint_behind(
    transformer: Transformer, conditioning: Conditioning
) -> None:
    """The request's thread ends with an error that nothing awaits; asyncio would log it with a traceback."""
    complaints: list[Any] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        await cancel_after_the_first_step(transformer, conditioning)
        await collect(transformer, conditioning, build_request(1))
        gc.collect()

    asyncio.run(run())
    assert complaints == []


def test_what_a_forward_raises_reaches_its_request_and_no_other(
    transformer: Transformer, conditioning: Conditioning
) -> None:
    name, outputs = conditioning.encodings[0]
    wrong = replace(conditioning, encodings=((name, tuple(torch.zeros(1, 7, 5) for _ in outputs)),))

    async def at_once() -> list[Any]:
        both = (collect(transformer, given, build_request()) for given in (wrong, conditioning))
        return await asyncio.gather(*both, return_exceptions=True)

    failed, served = asyncio.run(at_once())
    assert isinstance(failed, RuntimeError)
    assert isinstance(served[-1], torch.Tensor)


def test_a_request_that_fails_frees_its_seat(transformer: Transformer, conditioning: Conditioning) -> None:
    impossible = replace(conditioning, encodings=())
    with pytest.raises(RuntimeError, match="calls encode_prompt where the encode stage's called nothing"):
        asyncio.run(collect(transformer, impossible, build_request()))
    assert asyncio.run(queue_stats(transformer)).num_seats == 0


async def until(transformer: Transformer, num_waiting_requests: int, num_seats: int) -> None:
    while ((queue := await queue_stats(transformer)).num_waiting_requests, queue.num_seats) != (
        num_waiting_requests,
        num_seats,
    ):
        await asyncio.sleep(0.001)


def test_what_may_not_begin_yet_waits_without_a_thread_and_others_may_pass_it(
    transformer: Transformer, conditioning: Conditioning
) -> None:
    """Sends as many requests as may be at work, and one more of the same share, which waits.

    A request of another share does not wait.
    """

    async def run() -> tuple[Any, StepQueueStats]:
        endless = [
            asyncio.create_task(collect(transformer, conditioning, build_request(ENDLESS, seed=i)))
            for i in range(NUM_THREADS + 1)
        ]
        await until(transformer, num_waiting_requests=1, num_seats=NUM_THREADS + 1)
        given: dict[str, Any] = {"qos": Qos(share="another")}
        *_, latents = await _items(transformer.denoise(conditioning, build_request(2), **given))
        for task in endless:
            task.cancel()
        await asyncio.wait(endless)
        return latents, await queue_stats(transformer)

    latents, after = asyncio.run(run())
    assert isinstance(latents, torch.Tensor)
    assert (after.num_waiting_requests, after.num_seats) == (0, 0)


def test_what_cannot_be_done_in_time_is_ended_and_frees_its_seat(
    transformer: Transformer, conditioning: Conditioning
) -> None:
    given: dict[str, Any] = {"qos": Qos(deadline_s=2.0)}
    with pytest.raises(OutOfTime, match="steps that are left take at least"):
        asyncio.run(_items(transformer.denoise(conditioning, build_request(ENDLESS), **given)))
    after = asyncio.run(queue_stats(transformer))
    assert after.num_seats == 0
    assert after.num_out_of_time == 1


def test_one_of_several_replicas_gives_back_what_has_not_begun(
    transformer: Transformer, conditioning: Conditioning, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformer, "_start_timeout_s", 0.05)

    async def run() -> None:
        endless = [
            asyncio.create_task(collect(transformer, conditioning, build_request(ENDLESS, seed=i)))
            for i in range(NUM_THREADS)
        ]
        await until(transformer, num_waiting_requests=0, num_seats=NUM_THREADS)
        with pytest.raises(NotBegun):
            await collect(transformer, conditioning, build_request(ENDLESS))
        assert not any(task.done() for task in endless)
        for task in endless:
            task.cancel()
        await asyncio.wait(endless)

    asyncio.run(run())


def test_stats_tell_blocks_bytes_and_work(transformer: Transformer, conditioning: Conditioning) -> None:
    asyncio.run(collect(transformer, conditioning, build_request()))
    stats = asyncio.run(transformer.stats())
    [rank] = stats.ranks
    assert rank.blocks["transformer"][0] == 0
    assert list(rank.memory.weights_bytes) == ["cpu float32"]
    assert rank.num_micro_batches == sum(stats.queue.batch_sizes.values()) > 0
    assert 0 < rank.compute_s <= stats.occupied_s

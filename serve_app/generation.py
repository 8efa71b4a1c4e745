"""One request's way through the three stages, and what happens when one of them dies on the way.

Tensors go from stage to stage by reference; this process never reads one. Serve does not repeat a request it
has accepted, so this does: the request is seeded, hence idempotent, and starts again from the failed stage.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

from ray.exceptions import (
    ActorUnavailableError,
    ObjectLostError,
    RayActorError,
    RayError,
    RaySystemError,
    RayTaskError,
)
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)

from deployments.engine.step_queue import ShardGroupLost
from deployments.request import Denoised, GenerationRequest, Media, Progress, Prompt
from serve_app.errors import DeadlineExceeded, Overloaded, StageFailed, Unavailable

log = logging.getLogger("ray.serve")

MAX_LOSSES = 6
"""A request that has lost so many replicas may be what kills them."""
FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 2.0

AWAY = (DeploymentUnavailableError, ReplicaUnavailableError, ActorUnavailableError)
"""Nobody took the call; a replacement may still be loading, so this is repeated up to the deadline."""
INPUT_LOST = (RayTaskError, RayServeException, ObjectLostError)
"""Where these tell of a loss, the replica itself lives: a replica that died cannot raise. What it was given is
gone, by the death of the stage before or of the node that kept it."""
LOST = (RayActorError, RayServeException, ObjectLostError, RaySystemError, ShardGroupLost)
"""A process or an object is gone: the same call, made again, will be served by another replica."""

OnProgress = Callable[[int, Progress], None]
Answer = TypeVar("Answer")


class StageLost(Exception):
    """A stage, or what it was given, is gone. Seen in this file only."""

    def __init__(self, stage: str, cause: BaseException, *, was_served: bool) -> None:
        super().__init__(stage, cause, was_served)
        self.was_served = was_served

    def __str__(self) -> str:
        stage, cause, _ = self.args
        return f"the {stage} stage was lost ({_first_line(cause)})"


@dataclass(frozen=True)
class Stages:
    """Serve handles of the three deployments."""

    encoder: Any
    transformer: Any
    vae: Any


@dataclass(frozen=True)
class Picture:
    """One finished picture or video, and where its time went."""

    media: Media
    seed: int
    denoised: Denoised

    @property
    def timings_ms(self) -> dict[str, float]:
        """Milliseconds per stage."""
        times = {
            "encode": self.denoised.encode_ms,
            "queue": self.denoised.queue_ms,
            "denoise": self.denoised.denoise_ms,
            "decode": self.media.decode_ms,
        }
        return {stage: round(ms, 2) for stage, ms in times.items()}


async def generate(
    stages: Stages,
    requests: Sequence[GenerationRequest],
    *,
    timeout_s: float,
    on_progress: OnProgress | None = None,
) -> list[Picture]:
    """All pictures of one HTTP request, which share their prompt; in order. If one fails, all are given up.

    Raises Unavailable, DeadlineExceeded, Overloaded or StageFailed.
    """
    conditioning = SharedConditioning(stages.encoder, requests[0].prompt)
    tasks = [
        asyncio.create_task(_picture(stages, conditioning, request, _bind(on_progress, i)))
        for i, request in enumerate(requests)
    ]
    try:
        async with asyncio.timeout(timeout_s):
            return await asyncio.gather(*tasks)
    except TimeoutError as error:
        raise DeadlineExceeded(f"not done within request_timeout_s ({timeout_s:g} s)") from error
    finally:
        for task in tasks:
            task.cancel()


class SharedConditioning:
    """The encoder's answer, asked for once, passed on un-awaited, and asked for again when it is lost."""

    def __init__(self, encoder: Any, prompt: Prompt) -> None:
        self._encoder, self._prompt = encoder, prompt
        self._response: Any = None

    @property
    def response(self) -> Any:
        if self._response is None:
            self._response = self._encoder.encode.remote(self._prompt)
        return self._response

    def forget(self, lost: Any) -> None:
        """Ask the encoder anew, unless another picture of the request has done so already."""
        if self._response is lost:
            self._response = None


async def _picture(
    stages: Stages,
    conditioning: SharedConditioning,
    request: GenerationRequest,
    on_progress: Callable[[Progress], None] | None,
) -> Picture:
    reached: tuple[Denoised, Any] | None = None

    async def go_on() -> Picture:
        """From wherever the last attempt came to."""
        nonlocal reached
        if reached is None:
            given = conditioning.response
            with _naming("denoise", if_input_lost=lambda: conditioning.forget(given)):
                reached = await _denoise(stages.transformer, given, request, on_progress)
        denoised, latents = reached
        with _naming("decode", if_input_lost=forget_latents):
            media: Media = await stages.vae.decode.remote(latents, request)
        return Picture(media, request.seed, denoised)

    def forget_latents() -> None:
        nonlocal reached
        reached = None

    return await _repeat_when_lost(go_on)


async def _denoise(
    transformer: Any,
    conditioning: Any,
    request: GenerationRequest,
    on_progress: Callable[[Progress], None] | None,
) -> tuple[Denoised, Any]:
    """The summary, and a reference to the latents that this process owns and never reads.

    `_to_object_ref_gen` is Serve's advanced API for handing a stream's items on; it is used here alone.
    """
    stream = transformer.options(stream=True).denoise.remote(conditioning, request, on_progress is not None)
    try:
        references = await stream._to_object_ref_gen()
        async for reference in references:
            item = await reference
            if isinstance(item, Denoised):
                # Not `anext`, which fetches the value while it waits; `next` waits for the reference only.
                return item, await asyncio.to_thread(next, references)
            if on_progress is not None:
                on_progress(item)
        raise StageFailed("the transformer ended its stream without latents")
    except BaseException:
        stream.cancel()
        raise


@contextmanager
def _naming(stage: str, *, if_input_lost: Callable[[], None]) -> Iterator[None]:
    """A call of the stage: its errors as clients may see them, its loss as StageLost."""
    try:
        yield
    except BackPressureError as error:
        raise Overloaded(f"the {stage} stage's queue is full: {error}") from error
    except AWAY as error:
        raise StageLost(stage, error, was_served=False) from error
    except LOST as error:
        if isinstance(error, INPUT_LOST) and not isinstance(error, ShardGroupLost):
            if_input_lost()
        raise StageLost(stage, error, was_served=True) from error
    except RayError as error:
        raise StageFailed(f"the {stage} stage failed: {_last_line(error)}") from error


async def _repeat_when_lost(call: Callable[[], Awaitable[Answer]]) -> Answer:
    """Call until it is answered, or the caller's deadline ends it."""
    num_lost, backoff_s = 0, FIRST_BACKOFF_S
    for attempt in count(2):
        try:
            return await call()
        except StageLost as loss:
            num_lost += loss.was_served
            if num_lost == MAX_LOSSES:
                raise Unavailable(f"{loss}, {num_lost} times in all") from loss
            log.warning("%s; attempt %d follows", loss, attempt)
        await asyncio.sleep(backoff_s * random.uniform(0.5, 1.5))
        backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
    raise AssertionError("unreachable")


def _bind(on_progress: OnProgress | None, index: int) -> Callable[[Progress], None] | None:
    return None if on_progress is None else lambda progress: on_progress(index, progress)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _last_line(error: BaseException) -> str:
    """A Ray task error carries the remote traceback; its last line names the cause."""
    return str(error).strip().rpartition("\n")[2]

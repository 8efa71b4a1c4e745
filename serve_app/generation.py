"""One request's way through the three stages, as a stream of what happens on it.

Tensors go from stage to stage by reference; this process never reads one. A request whose stage is lost starts
again from that stage (losses.py).
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deployments.encoder_session import encoder_session
from deployments.request import (
    NO_NEWS,
    NOTHING_PREPARED,
    Denoised,
    ForwardCounts,
    GenerationRequest,
    InputPictures,
    Media,
    MediaSize,
    PartialDenoised,
    Progress,
    StreamOptions,
)
from deployments.step_cache import Quality
from serve_app.errors import BadRequest, DeadlineExceeded, RelayError, StageFailed
from serve_app.losses import StageLost, naming, repeat_when_lost
from serve_app.partials import PartialImage, Partials
from serve_app.streams import reference, reference_stream
from serve_app.suspects import Suspects
from serve_app.waking import Waking


class Stages:
    """Serve handles of the three deployments, who may be what kills them, and the sizes known to fit the VAE."""

    def __init__(
        self, encoder: Any, transformer: Any, vae: Any, suspects: Suspects, waking: Waking | None = None
    ) -> None:
        """waking: where some of them may sleep."""
        self.encoder, self.transformer, self.vae = encoder, transformer, vae
        self.suspects, self._waking = suspects, waking
        self._decodable: set[MediaSize] = set()

    @property
    def by_name(self) -> dict[str, Any]:
        return {"encoder": self.encoder, "transformer": self.transformer, "vae": self.vae}

    async def wake(self) -> float:
        """Milliseconds until all of them were awake."""
        return 0.0 if self._waking is None else await self._waking.wake()

    async def refuse_early(self, request: GenerationRequest) -> None:
        """Raises BadRequest for what the VAE could never decode, not after the whole denoise but beside it."""
        if request.size in self._decodable:
            return
        try:
            with naming("decode", param=_size_param(request)):
                await self.vae.check.remote(request)
            self._decodable.add(request.size)
        except BadRequest:
            raise
        except (RelayError, StageLost):  # the decode itself will tell, or will not
            pass


@dataclass(frozen=True)
class Picture:
    """One finished picture or video, and where its time went."""

    media: Media
    request: GenerationRequest
    denoised: Denoised
    wake_ms: float = 0.0
    """That the request waited for its model, which slept."""

    @property
    def seed(self) -> int:
        return self.request.seed

    @property
    def quality(self) -> Quality | None:
        """The tier in effect; None: a step cache of the request's own."""
        forwards = self.denoised.forwards
        return "high" if forwards.computed == forwards.asked else self.request.quality

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was asked for and could have no effect."""
        return (*self.denoised.warnings, *step_cache_warnings(self.request, self.denoised.forwards))

    @property
    def timings_ms(self) -> dict[str, float]:
        """Milliseconds per stage."""
        times = {
            "wake": self.wake_ms,
            "encode": self.denoised.encode_ms,
            "prepare": self.denoised.prepare_ms,
            "queue": self.denoised.queue_ms,
            "denoise": self.denoised.denoise_ms,
            "decode": self.media.decode_ms,
        }
        return {stage: round(ms, 2) for stage, ms in times.items()}

    @property
    def facts(self) -> dict[str, Any]:
        """How it was drawn, for answers."""
        return {
            "seed": self.seed,
            "timings_ms": self.timings_ms,
            "forwards": vars(self.denoised.forwards),
            "warnings": list(self.warnings),
        }


News = Progress | PartialImage | Picture


@dataclass(frozen=True)
class Event:
    """News of picture `index` of a request; a Picture is its last."""

    index: int
    news: News


async def generate(
    stages: Stages,
    requests: Sequence[GenerationRequest],
    options: StreamOptions = NO_NEWS,
    pictures: InputPictures | None = None,
    *,
    targets: Sequence[str] | None = None,
    timeout_s: float,
    heartbeat_s: float | None = None,
) -> AsyncGenerator[Event | None, None]:
    """What happens to the pictures of one request until all are there; those of one prompt share its encoding.

    None stands for heartbeat_s in which nothing happened. If one picture fails, all are given up; a caller that
    stops listening cancels them. Raises BadRequest, Unavailable, DeadlineExceeded or StageFailed.

    pictures: that go in.
    targets: of each picture that comes out, the URL of the file that its decode is to write.
    """
    events: asyncio.Queue[Event | None] = asyncio.Queue()

    def on_end(done: "asyncio.Task[None]") -> None:
        done.cancelled() or done.exception()  # seen: a caller that has left asks for it no more
        events.put_nowait(None)

    told = events.put_nowait
    drawing = asyncio.create_task(_draw(stages, requests, options, pictures, targets, timeout_s, told))
    drawing.add_done_callback(on_end)
    try:
        while True:
            try:
                async with asyncio.timeout(heartbeat_s):
                    event = await events.get()
            except TimeoutError:
                yield None
                continue
            if event is None:
                break
            yield event
        await drawing
    finally:
        drawing.cancel()


async def _draw(
    stages: Stages,
    requests: Sequence[GenerationRequest],
    options: StreamOptions,
    pictures: InputPictures | None,
    targets: Sequence[str] | None,
    timeout_s: float,
    tell: Callable[[Event], None],
) -> None:
    given = None if pictures is None else reference(pictures)  # one for all calls
    prompts = {
        request.prompt: SharedInputs(stages, request, given, encoder_session(request, pictures))
        for request in requests
    }

    async def picture(index: int, request: GenerationRequest) -> None:
        inputs, target = prompts[request.prompt], None if targets is None else targets[index]
        finished = await _picture(stages, inputs, request, options, target, lambda news: tell(Event(index, news)))
        tell(Event(index, replace(finished, wake_ms=wake_ms)))

    tasks: list[asyncio.Task[None]] = []
    try:
        async with asyncio.timeout(timeout_s):
            wake_ms = await stages.wake()
            tasks += [asyncio.create_task(picture(i, request)) for i, request in enumerate(requests)]
            tasks.append(asyncio.create_task(stages.refuse_early(requests[0])))
            await asyncio.gather(*tasks)
    except TimeoutError as error:
        raise DeadlineExceeded(f"not done within request_timeout_s ({timeout_s:g} s)") from error
    finally:
        for task in tasks:
            task.cancel()


def step_cache_warnings(request: GenerationRequest, forwards: ForwardCounts) -> tuple[str, ...]:
    """Where a tier, or a step cache, has changed nothing."""
    cache, quality = request.step_cache, request.quality
    if cache is None:
        if quality == "high":
            return ()
        return (
            f"quality: this model has no tier {quality}, so every step was computed: set model.tiers.{quality}",
        )
    if forwards.computed < forwards.asked:
        return ()
    field = "step_cache" if quality is None else "quality"
    return (
        f"{field}: nothing was reused in {request.num_inference_steps} steps, of which {cache.kind} computes the "
        f"first {cache.first_steps} and the last {cache.last_steps} in any case",
    )


def _size_param(request: GenerationRequest) -> str:
    """The field to blame for what is too large."""
    return "num_frames" if request.num_frames > 1 else "size"


@dataclass(frozen=True)
class Inputs:
    """What a denoise is given: answers of other stages, un-awaited, and a reference to pictures."""

    conditioning: Any
    prepared: Any
    pictures: Any


class SharedInputs:
    """Asked for once, passed on un-awaited, and asked for again when they are lost."""

    def __init__(self, stages: Stages, request: GenerationRequest, pictures: Any, session_id: str) -> None:
        """pictures: a reference to those that go in, or None. session_id: of the encoder."""
        self._stages, self._request, self._pictures = stages, request, pictures
        self._session_id = session_id
        self._current: Inputs | None = None

    @property
    def current(self) -> Inputs:
        if self._current is None:
            request, pictures = self._request, self._pictures
            encoder = self._stages.encoder.options(session_id=self._session_id)
            if pictures is None:
                conditioning = encoder.encode.remote(request)
                prepared: Any = NOTHING_PREPARED
            else:
                conditioning = encoder.encode.remote(request, pictures)
                prepared = self._stages.vae.prepare.remote(conditioning, request, pictures)
            self._current = Inputs(conditioning, prepared, pictures)
        return self._current

    def forget(self, lost: Inputs) -> None:
        """Ask anew, unless another picture of the request has done so already."""
        if self._current is lost:
            self._current = None


async def _picture(
    stages: Stages,
    inputs: SharedInputs,
    request: GenerationRequest,
    options: StreamOptions,
    target: str | None,
    tell: Callable[[News], None],
) -> Picture:
    reached: tuple[Denoised, Any] | None = None
    partials = Partials(stages.vae, request, tell)
    size_param = _size_param(request)

    async def go_on() -> Picture:
        """From wherever the last attempt came to."""
        nonlocal reached
        if reached is None:
            given = inputs.current
            with naming("denoise", param=size_param, if_input_lost=lambda: inputs.forget(given)):
                reached = await _denoise(stages.transformer, given, request, options, partials, tell)
        denoised, latents = reached
        if options.wants_progress:
            num_steps = request.num_inference_steps
            tell(Progress(num_steps, num_steps, 0.0, "decode"))
        with naming("decode", param=size_param, if_input_lost=forget_latents):
            media: Media = await stages.vae.decode.remote(latents, request, target)
        return Picture(media, request, denoised)

    def forget_latents() -> None:
        nonlocal reached
        reached = None

    try:
        return await repeat_when_lost(go_on, stages.suspects)
    finally:
        partials.drop()


async def _denoise(
    transformer: Any,
    given: Inputs,
    request: GenerationRequest,
    options: StreamOptions,
    partials: Partials,
    tell: Callable[[News], None],
) -> tuple[Denoised, Any]:
    """The summary, and a reference to what is to be decoded, which this process owns and never reads."""
    async with reference_stream(
        lambda: transformer.options(stream=True).denoise.remote(
            given.conditioning, request, options, given.prepared, given.pictures
        )
    ) as references:
        async for reference in references:
            item = await reference
            if isinstance(item, Progress):
                tell(item)
                continue
            # Not `anext`, which fetches the value while it waits; `next` waits for the reference only.
            latents = await asyncio.to_thread(next, references)
            if isinstance(item, Denoised):
                return item, latents
            assert isinstance(item, PartialDenoised)
            partials.add(item.partial_image_index, latents)
        raise StageFailed("the transformer ended its stream without latents")

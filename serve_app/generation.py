"""Sends one request through the three stages, and streams its events.

Tensors go from stage to stage by reference; this process never reads one. A request whose stage is lost starts
again from that stage (retries.py).
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from deployments.answers import Denoised, Media, PartialDenoised, Progress, StepsSaved
from deployments.errors import NotBegun
from deployments.options.qos import DEFAULT_QOS, Qos
from deployments.replica.encoder_session import encoder_session
from deployments.request import NO_EVENTS, GenerationRequest, InputPictures, StreamOptions
from serve_app.errors import DeadlineExceeded, StageFailed
from serve_app.flow.deadline import RequestDeadline
from serve_app.flow.events import Event, Payload, Picture
from serve_app.flow.journal_refs import JournalRefs
from serve_app.flow.latest_queue import LatestQueue
from serve_app.flow.partials import Partials
from serve_app.flow.retries import retry_when_lost, translating_errors
from serve_app.flow.shared_inputs import DenoiseInputs, SharedInputs
from serve_app.flow.stages import Stages, size_field
from serve_app.flow.streams import reference, reference_stream
from serve_app.flow.target import IN_MEMORY, Target


async def generate(
    stages: Stages,
    requests: Sequence[GenerationRequest],
    options: StreamOptions = NO_EVENTS,
    pictures: InputPictures | None = None,
    *,
    qos: Qos = DEFAULT_QOS,
    targets: Sequence[Target] | None = None,
    timeout_s: float,
    heartbeat_s: float | None = None,
) -> AsyncGenerator[Event | None, None]:
    """Yields the events of one request until all its images are done; images with the same prompt share its
    encoding.

    None means that nothing happened for heartbeat_s. If one image fails, all are cancelled; closing the generator
    cancels them too. Raises BadRequest, Unavailable, DeadlineExceeded or StageFailed.

    pictures: input images.
    targets: one for each output image; None: the caller's memory.
    """
    events = LatestQueue[Event | None]()

    def on_end(done: "asyncio.Task[None]") -> None:
        done.cancelled() or done.exception()  # marks the exception as retrieved: a caller that has left does not
        events.put(None)

    def tell(event: Event) -> None:
        payload = event.payload
        events.put(event, key=(event.index, payload.phase) if isinstance(payload, Progress) else None)

    deadline = RequestDeadline(qos, timeout_s)
    drawing = asyncio.create_task(_draw(stages, requests, options, pictures, deadline, targets, tell))
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
    deadline: RequestDeadline,
    targets: Sequence[Target] | None,
    tell: Callable[[Event], None],
) -> None:
    given = None if pictures is None else reference(pictures)  # one reference for all calls
    prompts = {
        request.prompt: SharedInputs(
            stages.encoder.options(session_id=encoder_session(request, pictures)),
            stages.vae,
            request,
            given,
            deadline.qos,
        )
        for request in requests
    }

    async def picture(index: int, request: GenerationRequest) -> None:
        inputs, target = prompts[request.prompt], IN_MEMORY if targets is None else targets[index]
        finished = await _picture(
            stages, inputs, request, options, deadline, target, lambda payload: tell(Event(index, payload))
        )
        tell(Event(index, replace(finished, wake_ms=wake_ms)))

    tasks: list[asyncio.Task[None]] = []
    try:
        async with asyncio.timeout(deadline.limit_s):
            wake_ms = await stages.wake()
            tasks += [asyncio.create_task(picture(i, request)) for i, request in enumerate(requests)]
            tasks.append(asyncio.create_task(stages.refuse_early(requests[0])))
            await asyncio.gather(*tasks)
    except TimeoutError as error:
        raise deadline.exceeded() from error
    except DeadlineExceeded as error:  # a stage has foreseen it
        raise deadline.exceeded(error.message) from error
    finally:
        for task in tasks:
            task.cancel()


async def _picture(
    stages: Stages,
    inputs: SharedInputs,
    request: GenerationRequest,
    options: StreamOptions,
    deadline: RequestDeadline,
    target: Target,
    tell: Callable[[Payload], None],
) -> Picture:
    reached: tuple[Denoised, Any] | None = None
    journal = JournalRefs(target.journal_url)
    partials = Partials(stages.vae, request, tell)
    size_param = size_field(request)

    async def go_on() -> Picture:
        """Continues where the last attempt ended."""
        nonlocal reached
        if reached is None:
            given = inputs.current
            with translating_errors("denoise", param=size_param, if_input_lost=lambda: forget_inputs(given)):
                while reached is None:
                    with suppress(NotBegun):
                        qos = deadline.qos()
                        reached = await _denoise(
                            stages.transformer, given, request, options, qos, journal, partials, tell
                        )
            journal.parts.clear()
        denoised, latents = reached
        if options.wants_progress:
            num_steps = request.num_inference_steps
            tell(Progress(num_steps, num_steps, 0.0, "decode"))
        with translating_errors("decode", param=size_param, if_input_lost=forget_latents):
            media: Media = await stages.vae.decode.remote(latents, request, target.url, deadline.qos())
        return Picture(media, request, denoised)

    def forget_inputs(given: DenoiseInputs) -> None:
        inputs.forget(given)
        journal.parts.clear()  # the error does not say which part is lost

    def forget_latents() -> None:
        nonlocal reached
        reached = None

    try:
        return await retry_when_lost(go_on, stages.isolation)
    finally:
        partials.drop()


async def _denoise(
    transformer: Any,
    given: DenoiseInputs,
    request: GenerationRequest,
    options: StreamOptions,
    qos: Qos,
    journal: JournalRefs,
    partials: Partials,
    tell: Callable[[Payload], None],
) -> tuple[Denoised, Any]:
    """Returns the summary, and a reference to the latents, which this process owns and never reads.

    Resumes from the journal and appends to it.
    """
    async with reference_stream(
        lambda: transformer.options(stream=True).denoise.remote(
            given.conditioning,
            request,
            options,
            given.prepared,
            given.pictures,
            journal.url,
            *journal.parts,
            qos=qos,
        )
    ) as references:
        async for reference in references:
            item = await reference
            if isinstance(item, Progress):
                tell(item)
                continue
            # `anext` would also fetch the value; `next` waits only for the reference.
            tensors = await asyncio.to_thread(next, references)
            if isinstance(item, Denoised):
                return item, tensors
            if isinstance(item, StepsSaved):
                journal.parts.append(tensors)
                continue
            assert isinstance(item, PartialDenoised)
            partials.add(item.partial_image_index, tensors)
        raise StageFailed("the transformer ended its stream without latents")

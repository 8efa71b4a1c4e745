"""Tests of the events of a request, and of what is repeated when a stage is lost.

The handles are stand-ins for Serve's, whose calls end as a test specifies. Which error stands for which loss was
observed in Ray 2.60 (`relay bench faults`).
"""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from deployments import errors as stage_errors
from deployments.answers import Denoised, ForwardCounts, Media, PartialDenoised, Progress
from deployments.errors import ExceedsMemory, NotBegun, OutOfTime, ShardGroupLost, WrongField, raised_in
from deployments.options.qos import DEFAULT_QOS, Qos
from deployments.request import NO_EVENTS, GenerationRequest, Prompt, StreamOptions
from serve_app.errors import BadRequest, DeadlineExceeded, NonFinite, StageFailed
from serve_app.flow import retries
from serve_app.flow.events import Payload, Picture
from serve_app.flow.isolation import PoisonIsolation
from serve_app.flow.partials import PartialImage
from serve_app.flow.retries import MAX_ISOLATED_LOSSES, MAX_SHARED_LOSSES
from serve_app.flow.stages import Stages
from serve_app.generation import generate

REQUEST = GenerationRequest(
    prompt=Prompt("a cat", None, False),
    width=64,
    height=64,
    num_frames=1,
    num_inference_steps=4,
    guidance_scale=None,
    true_cfg_scale=None,
    seed=0,
    output_format="png",
    output_compression=100,
    fps=8,
)
ISOLATION = PoisonIsolation(f"test_generation-{os.getpid()}")
REPLICA_DIED = ActorDiedError()
INPUT_LOST = RayServeException("failed because an upstream actor died before finishing a dependent task")
AWAY = DeploymentUnavailableError(DeploymentID("Vae", "relay"))


def raised_in_replica(cause: Exception) -> Exception:
    """Returns the error as Ray raises it: a RayTaskError that is also an instance of the cause's class."""
    error: Exception = RayTaskError("denoise", f"Traceback\n{cause!r}", cause).as_instanceof_cause()
    return error


class Calls:
    """A stage whose first calls raise the given errors, in this order; later calls succeed."""

    def __init__(self, *errors: Exception) -> None:
        self._errors: Iterator[Exception] = iter(errors)
        self.arguments: list[Any] = []
        self.qos_seen: list[Qos] = []

    def start(self, argument: Any) -> Exception | None:
        self.arguments.append(argument)
        return next(self._errors, None)


class EncodeHandle(Calls):
    encode = property(lambda self: self)

    def options(self, *, session_id: str) -> "EncodeHandle":
        self.session_id = session_id
        return self

    def remote(self, prompt: Prompt, _pictures: None, qos: Qos) -> str:
        self.qos_seen.append(qos)
        self.start(prompt)
        return f"conditioning {len(self.arguments)}"


class DenoiseHandle(Calls):
    """num_partials: number of partial images that every call yields before it ends."""

    denoise = property(lambda self: self)

    def __init__(self, *errors: Exception, num_partials: int = 0) -> None:
        super().__init__(*errors)
        self._num_partials = num_partials

    def options(self, *, stream: bool) -> "DenoiseHandle":
        assert stream
        return self

    def remote(self, conditioning: str, *_: Any, qos: Qos) -> "Stream":
        self.qos_seen.append(qos)
        return Stream(self.start(conditioning), f"latents {len(self.arguments)}", self._num_partials)


class Stream:
    """An asynchronous and a synchronous iterator, as Ray's generators of references are.

    An error is raised after the partial images.
    """

    def __init__(self, error: Exception | None, latents: str, num_partials: int) -> None:
        self._error, self._num_partials = error, num_partials
        self._latents = iter([*(f"partial {i} of {latents}" for i in range(num_partials)), latents])

    async def _to_object_ref_gen(self) -> "Stream":
        return self

    async def __aiter__(self) -> AsyncIterator["asyncio.Future[Any]"]:
        for i in range(self._num_partials):
            yield ready(PartialDenoised(i))
            await asyncio.sleep(0.01)  # a step
        if self._error is not None:
            raise self._error
        yield ready(Denoised(encode_ms=1, prepare_ms=0, queue_ms=1, denoise_ms=1, forwards=ForwardCounts(2, 2)))

    def __next__(self) -> str:
        return next(self._latents)

    def completed(self) -> "asyncio.Future[Any]":
        return ready(None)


def ready(item: Any) -> "asyncio.Future[Any]":
    reference = asyncio.get_running_loop().create_future()
    reference.set_result(item)
    return reference


class CheckHandle(Calls):
    def remote(self, request: GenerationRequest) -> "asyncio.Future[None]":
        answer = asyncio.get_running_loop().create_future()
        error = self.start(request)
        answer.set_result(None) if error is None else answer.set_exception(error)
        return answer


class DecodeHandle(Calls):
    decode = property(lambda self: self)

    def __init__(
        self,
        *errors: Exception,
        takes_s: float = 0.0,
        partials: Calls | None = None,
        check: CheckHandle | None = None,
    ) -> None:
        super().__init__(*errors)
        self._takes_s, self._partials = takes_s, partials
        self.check = check or CheckHandle()

    @property
    def decode_partial(self) -> "DecodeHandle":
        assert isinstance(self._partials, DecodeHandle)
        return self._partials

    def remote(
        self, latents: str, _: GenerationRequest, target: str | None = None, qos: Qos = DEFAULT_QOS
    ) -> "asyncio.Task[Media]":
        self.qos_seen.append(qos)
        return asyncio.create_task(self._decode(latents))

    async def _decode(self, latents: str) -> Media:
        await asyncio.sleep(self._takes_s)
        if error := self.start(latents):
            raise error
        return Media(latents.encode(), "image/png", 1.0)


@pytest.fixture(autouse=True)
def _no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_BACKOFF_S", 0.001)
    monkeypatch.setattr(retries, "MAX_BACKOFF_S", 0.001)


def payloads(
    encoder: Calls, transformer: Calls, vae: Calls, options: StreamOptions = NO_EVENTS, **how: Any
) -> list[Payload | None]:
    return told(Stages(encoder, transformer, vae, ISOLATION), options, **how)


def told(
    stages: Stages,
    options: StreamOptions = NO_EVENTS,
    *,
    timeout_s: float = 10,
    heartbeat_s: float | None = None,
    requests: Sequence[GenerationRequest] = (REQUEST,),
    qos: Qos = DEFAULT_QOS,
) -> list[Payload | None]:
    async def collect() -> list[Payload | None]:
        limits = {"timeout_s": timeout_s, "heartbeat_s": heartbeat_s}
        events = generate(stages, requests, options, qos=qos, **limits)
        return [event and event.payload async for event in events]

    return asyncio.run(collect())


def run(encoder: Calls, transformer: Calls, vae: Calls, **how: Any) -> Picture:
    [picture] = payloads(encoder, transformer, vae, **how)
    assert isinstance(picture, Picture)
    return picture


def partials(transformer: Calls, decode_partial: Calls) -> list[tuple[int, bytes]]:
    """Returns index and data of each partial image. Asserts that the final image follows them."""
    vae = DecodeHandle(partials=decode_partial)
    *before, picture = payloads(EncodeHandle(), transformer, vae, StreamOptions(num_partial_images=3))
    assert isinstance(picture, Picture)
    assert all(isinstance(partial, PartialImage) for partial in before)
    return [(partial.partial_image_index, partial.media.data) for partial in before]  # type: ignore[union-attr]


def test_every_prompt_of_a_request_is_encoded_once_for_all_its_pictures() -> None:
    dog = Prompt("a dog", None, False)
    requests = [REQUEST, replace(REQUEST, seed=1), replace(REQUEST, prompt=dog)]
    encoder, transformer = EncodeHandle(), DenoiseHandle()
    payloads(encoder, transformer, DecodeHandle(), requests=requests)
    assert [request.prompt for request in encoder.arguments] == [REQUEST.prompt, dog]
    assert transformer.arguments == ["conditioning 1", "conditioning 1", "conditioning 2"]


def test_the_encoder_is_told_which_prompts_are_the_same() -> None:
    """Requests with the same prompt have the same session, so they reach the same replica."""

    def session_id(request: GenerationRequest) -> str:
        encoder = EncodeHandle()
        payloads(encoder, DenoiseHandle(), DecodeHandle(), requests=[request])
        return encoder.session_id

    other = replace(REQUEST, prompt=Prompt("a dog", None, False))
    assert session_id(REQUEST) == session_id(replace(REQUEST, seed=1)) != session_id(other)


def test_partial_pictures_are_told_in_order_before_the_picture() -> None:
    transformer, decode_partial = DenoiseHandle(num_partials=3), DecodeHandle()
    expected = [(i, f"partial {i} of latents 1".encode()) for i in range(3)]
    assert partials(transformer, decode_partial) == expected


def test_a_partial_picture_that_is_not_ready_with_the_picture_is_dropped() -> None:
    assert partials(DenoiseHandle(num_partials=3), DecodeHandle(takes_s=60)) == []


@pytest.mark.parametrize("error", [REPLICA_DIED, AWAY, INPUT_LOST, ValueError("bad shape")])
def test_a_partial_picture_that_fails_is_left_out(error: Exception) -> None:
    shown = partials(DenoiseHandle(num_partials=3), DecodeHandle(error))
    assert [index for index, _ in shown] == [1, 2]


def test_no_partial_picture_is_told_twice_when_the_denoise_is_repeated() -> None:
    shown = partials(DenoiseHandle(REPLICA_DIED, REPLICA_DIED, num_partials=3), DecodeHandle())
    assert [index for index, _ in shown] == [0, 1, 2]


def test_progress_ends_with_the_decode() -> None:
    last, picture = payloads(EncodeHandle(), DenoiseHandle(), DecodeHandle(), StreamOptions(wants_progress=True))
    assert last == Progress(4, 4, 0.0, "decode")
    assert isinstance(picture, Picture)


def test_silence_is_told_by_heartbeats() -> None:
    *silence, picture = payloads(EncodeHandle(), DenoiseHandle(), DecodeHandle(takes_s=0.2), heartbeat_s=0.02)
    assert 2 <= len(silence) <= 10
    assert set(silence) == {None}
    assert isinstance(picture, Picture)


@pytest.mark.parametrize("error", [REPLICA_DIED, raised_in_replica(ShardGroupLost("rank 1 died"))])
def test_a_lost_shard_group_costs_another_denoise_and_no_encode(error: Exception) -> None:
    encoder, transformer, vae = EncodeHandle(), DenoiseHandle(error, error), DecodeHandle()
    assert run(encoder, transformer, vae).media.data.startswith(b"latents")
    assert len(encoder.arguments) == 1
    assert transformer.arguments == ["conditioning 1"] * 3


@pytest.mark.parametrize("error", [INPUT_LOST, raised_in_replica(ObjectLostError("a1", None, ""))])
def test_lost_embeddings_are_encoded_again(error: Exception) -> None:
    encoder, transformer, vae = EncodeHandle(), DenoiseHandle(error), DecodeHandle()
    assert run(encoder, transformer, vae).media.data.startswith(b"latents")
    assert transformer.arguments == ["conditioning 1", "conditioning 2"]


def test_a_lost_vae_costs_another_decode_and_no_denoise() -> None:
    encoder, transformer, vae = EncodeHandle(), DenoiseHandle(), DecodeHandle(REPLICA_DIED, AWAY)
    assert run(encoder, transformer, vae).media.data.startswith(b"latents")
    assert vae.arguments == ["latents 1"] * 3
    assert len(transformer.arguments) == len(encoder.arguments) == 1


@pytest.mark.parametrize("error", [INPUT_LOST, raised_in_replica(ObjectLostError("a1", None, ""))])
def test_lost_latents_are_denoised_again_from_the_same_embeddings(error: Exception) -> None:
    encoder, transformer, vae = EncodeHandle(), DenoiseHandle(), DecodeHandle(error)
    assert run(encoder, transformer, vae).media.data.startswith(b"latents")
    assert vae.arguments == ["latents 1", "latents 2"]
    assert transformer.arguments == ["conditioning 1"] * 2


def test_a_request_that_kills_replicas_is_given_up() -> None:
    transformer = DenoiseHandle(*[REPLICA_DIED] * 100)
    with pytest.raises(StageFailed, match=r"denoise stage was lost.* 4 times"):
        run(EncodeHandle(), transformer, DecodeHandle())
    assert len(transformer.arguments) == MAX_SHARED_LOSSES + MAX_ISOLATED_LOSSES


@pytest.mark.parametrize("error", [AWAY, ActorUnavailableError("no answer", None)])
def test_an_absent_stage_is_waited_for(error: Exception) -> None:
    vae = DecodeHandle(*[error] * 30)
    assert run(EncodeHandle(), DenoiseHandle(), vae).media.data.startswith(b"latents")


def test_what_the_vae_could_never_decode_is_refused_while_it_is_denoised() -> None:
    check = CheckHandle(raised_in_replica(ExceedsMemory("decoding 64x64 needs too much")))
    encoder, transformer, vae = EncodeHandle(), DenoiseHandle(), DecodeHandle(takes_s=60, check=check)
    with pytest.raises(BadRequest, match="size: in the decode stage decoding 64x64 needs too much"):
        run(encoder, transformer, vae)


@pytest.mark.parametrize("error", [REPLICA_DIED, AWAY, raised_in_replica(ValueError("bad shape"))])
def test_a_check_that_fails_leaves_it_to_the_decode(error: Exception) -> None:
    vae = DecodeHandle(check=CheckHandle(error))
    assert run(EncodeHandle(), DenoiseHandle(), vae).media.data.startswith(b"latents")


def test_the_vae_is_asked_once_for_all_pictures_of_a_size() -> None:
    check = CheckHandle()
    stages = Stages(EncodeHandle(), DenoiseHandle(), DecodeHandle(check=check), ISOLATION)
    for _ in range(2):
        told(stages, requests=[REQUEST, replace(REQUEST, seed=1)])
    assert check.arguments == [REQUEST]


def test_waiting_ends_with_the_deadline() -> None:
    with pytest.raises(DeadlineExceeded, match=r"request_timeout_s \(0.2 s\)"):
        run(EncodeHandle(), DenoiseHandle(), DecodeHandle(*[AWAY] * 10**6), timeout_s=0.2)


def test_stages_are_told_who_goes_first_and_what_is_left_of_its_deadline() -> None:
    encoder, transformer, vae = EncodeHandle(), DenoiseHandle(REPLICA_DIED), DecodeHandle()
    asked = Qos("high", "ann", deadline_s=5)
    run(encoder, transformer, vae, qos=asked)
    first, again = transformer.qos_seen
    assert (first.priority, first.share) == ("high", "ann")
    assert first.left_s is not None
    assert again.left_s is not None
    assert 0 < again.left_s < first.left_s <= 5
    assert again.waited_s > first.waited_s
    for [told] in (encoder.qos_seen, vae.qos_seen):
        assert (told.priority, told.share, told.left_s is not None) == ("high", "ann", True)


def test_what_has_not_begun_is_asked_for_anew_with_the_time_that_it_has_waited() -> None:
    encoder, transformer = EncodeHandle(), DenoiseHandle(*[raised_in_replica(NotBegun("in 10 s"))] * 5)
    assert run(encoder, transformer, DecodeHandle()).media.data == b"latents 6"
    assert len(encoder.arguments) == 1
    waited = [each.waited_s for each in transformer.qos_seen]
    assert waited == sorted(waited)
    assert waited[0] < waited[-1]


@pytest.mark.parametrize("deadline_s", [None, 5.0])
def test_a_stage_that_foresees_the_deadline_ends_the_request(deadline_s: float | None) -> None:
    """The error names the limit that applies."""
    transformer = DenoiseHandle(raised_in_replica(OutOfTime("9 steps are left")))
    with pytest.raises(DeadlineExceeded, match="9 steps are left") as ended:
        run(EncodeHandle(), transformer, DecodeHandle(), qos=Qos(deadline_s=deadline_s))
    assert ended.value.param == (None if deadline_s is None else "deadline_s")
    assert len(transformer.arguments) == 1


def test_an_error_of_the_stage_itself_is_not_repeated() -> None:
    transformer = DenoiseHandle(*[raised_in_replica(ValueError("bad shape"))] * 2)
    with pytest.raises(StageFailed, match=r"denoise stage failed: ValueError.*bad shape"):
        run(EncodeHandle(), transformer, DecodeHandle())
    assert len(transformer.arguments) == 1


def test_an_error_is_told_of_the_stage_in_which_it_was_raised() -> None:
    """An error of the encoder is raised by the denoise call, which takes the encoder's answer."""
    with pytest.raises(ValueError, match="no such token") as raised, raised_in("encode"):
        raise ValueError("no such token")
    with pytest.raises(StageFailed, match=r"the encode stage failed: ValueError.*no such token"):
        run(EncodeHandle(), DenoiseHandle(raised_in_replica(raised.value)), DecodeHandle())


def test_what_is_not_finite_is_an_error_of_its_own_and_not_repeated() -> None:
    transformer = DenoiseHandle(*[raised_in_replica(stage_errors.NonFinite("the latents are NaN"))] * 2)
    with pytest.raises(NonFinite, match="the denoise stage: the latents are NaN") as refused:
        run(EncodeHandle(), transformer, DecodeHandle())
    assert len(transformer.arguments) == 1
    assert (refused.value.status, refused.value.code) == (500, "not_finite")
    assert refused.value.headers() == {"x-should-retry": "false"}


def test_a_field_that_the_pipeline_does_not_take_is_the_clients_mistake() -> None:
    transformer = DenoiseHandle(raised_in_replica(WrongField("at most 50", "num_inference_steps")))
    with pytest.raises(BadRequest, match="num_inference_steps: at most 50") as refused:
        run(EncodeHandle(), transformer, DecodeHandle())
    assert refused.value.param == "num_inference_steps"

"""What is repeated when a stage is lost. The handles play Serve's part: each call ends as its script says.

Which error stands for which loss was seen in Ray 2.60 (`relay bench recovery`).
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from deployments.engine.step_queue import ShardGroupLost
from deployments.request import Denoised, GenerationRequest, Media, Prompt
from serve_app import generation
from serve_app.errors import DeadlineExceeded, Overloaded, StageFailed, Unavailable
from serve_app.generation import MAX_LOSSES, Picture, Stages, generate

MEDIA = Media(b"picture", "image/png", 1.0)
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
REPLICA_DIED = ActorDiedError()
INPUT_LOST = RayServeException("failed because an upstream actor died before finishing a dependent task")
AWAY = DeploymentUnavailableError(DeploymentID("Vae", "relay"))


def raised_in_replica(cause: Exception) -> Exception:
    """As Ray hands it over: a RayTaskError that is of the cause's class, too."""
    error: Exception = RayTaskError("denoise", f"Traceback\n{cause!r}", cause).as_instanceof_cause()
    return error


class Calls:
    """A stage whose calls end with the errors given, one after another, and succeed from then on."""

    def __init__(self, *errors: Exception) -> None:
        self._errors: Iterator[Exception] = iter(errors)
        self.arguments: list[Any] = []

    def start(self, argument: Any) -> Exception | None:
        self.arguments.append(argument)
        return next(self._errors, None)


class EncodeHandle(Calls):
    encode = property(lambda self: self)

    def remote(self, prompt: Prompt) -> str:
        self.start(prompt)
        return f"conditioning {len(self.arguments)}"


class DenoiseHandle(Calls):
    denoise = property(lambda self: self)

    def options(self, *, stream: bool) -> "DenoiseHandle":
        assert stream
        return self

    def remote(self, conditioning: str, *_: Any) -> "Stream":
        return Stream(self.start(conditioning), f"latents {len(self.arguments)}")


class Stream:
    """An asynchronous and a synchronous iterator, as Ray's generators of references are."""

    def __init__(self, error: Exception | None, latents: str) -> None:
        self._error, self._latents = error, latents

    async def _to_object_ref_gen(self) -> "Stream":
        if self._error is not None:
            raise self._error
        return self

    async def __aiter__(self) -> AsyncIterator["asyncio.Future[Denoised]"]:
        reference = asyncio.get_running_loop().create_future()
        reference.set_result(Denoised(encode_ms=1, is_cached=False, queue_ms=1, denoise_ms=1))
        yield reference

    def __next__(self) -> str:
        return self._latents

    def cancel(self) -> None:
        """Told when the call has failed."""


class DecodeHandle(Calls):
    decode = property(lambda self: self)

    async def remote(self, latents: str, _: GenerationRequest) -> Media:
        if error := self.start(latents):
            raise error
        return MEDIA


@pytest.fixture(autouse=True)
def _no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "FIRST_BACKOFF_S", 0.001)
    monkeypatch.setattr(generation, "MAX_BACKOFF_S", 0.001)


def run(encoder: Calls, transformer: Calls, vae: Calls, timeout_s: float = 10) -> Picture:
    [picture] = asyncio.run(generate(Stages(encoder, transformer, vae), [REQUEST], timeout_s=timeout_s))
    return picture


@pytest.mark.parametrize("error", [REPLICA_DIED, raised_in_replica(ShardGroupLost("rank 1 died"))])
def test_a_lost_shard_group_costs_another_denoise_and_no_encode(error: Exception) -> None:
    encoder, transformer, vae = EncodeHandle(), DenoiseHandle(error, error), DecodeHandle()
    assert run(encoder, transformer, vae).media == MEDIA
    assert len(encoder.arguments) == 1
    assert transformer.arguments == ["conditioning 1"] * 3


@pytest.mark.parametrize("error", [INPUT_LOST, raised_in_replica(ObjectLostError("a1", None, ""))])
def test_lost_embeddings_are_encoded_again(error: Exception) -> None:
    encoder, transformer, vae = EncodeHandle(), DenoiseHandle(error), DecodeHandle()
    assert run(encoder, transformer, vae).media == MEDIA
    assert transformer.arguments == ["conditioning 1", "conditioning 2"]


def test_a_lost_vae_costs_another_decode_and_no_denoise() -> None:
    encoder, transformer, vae = EncodeHandle(), DenoiseHandle(), DecodeHandle(REPLICA_DIED, AWAY)
    assert run(encoder, transformer, vae).media == MEDIA
    assert vae.arguments == ["latents 1"] * 3
    assert len(transformer.arguments) == len(encoder.arguments) == 1


@pytest.mark.parametrize("error", [INPUT_LOST, raised_in_replica(ObjectLostError("a1", None, ""))])
def test_lost_latents_are_denoised_again_from_the_same_embeddings(error: Exception) -> None:
    encoder, transformer, vae = EncodeHandle(), DenoiseHandle(), DecodeHandle(error)
    assert run(encoder, transformer, vae).media == MEDIA
    assert vae.arguments == ["latents 1", "latents 2"]
    assert transformer.arguments == ["conditioning 1"] * 2


def test_a_request_that_may_be_what_kills_replicas_is_given_up() -> None:
    transformer = DenoiseHandle(*[REPLICA_DIED] * 100)
    with pytest.raises(Unavailable, match="denoise stage was lost"):
        run(EncodeHandle(), transformer, DecodeHandle())
    assert len(transformer.arguments) == MAX_LOSSES


@pytest.mark.parametrize("error", [AWAY, ActorUnavailableError("no answer", None)])
def test_an_absent_stage_is_waited_for(error: Exception) -> None:
    vae = DecodeHandle(*[error] * 5 * MAX_LOSSES)
    assert run(EncodeHandle(), DenoiseHandle(), vae).media == MEDIA


def test_waiting_ends_with_the_deadline() -> None:
    with pytest.raises(DeadlineExceeded, match=r"request_timeout_s \(0.2 s\)"):
        run(EncodeHandle(), DenoiseHandle(), DecodeHandle(*[AWAY] * 10**6), timeout_s=0.2)


def test_an_error_of_the_stage_itself_is_not_repeated() -> None:
    transformer = DenoiseHandle(*[raised_in_replica(ValueError("bad shape"))] * 2)
    with pytest.raises(StageFailed, match=r"denoise stage failed: ValueError.*bad shape"):
        run(EncodeHandle(), transformer, DecodeHandle())
    assert len(transformer.arguments) == 1


def test_a_full_queue_is_not_waited_for() -> None:
    vae = DecodeHandle(*[BackPressureError(num_queued_requests=9, max_queued_requests=8)] * 2)
    with pytest.raises(Overloaded, match="decode stage's queue is full"):
        run(EncodeHandle(), DenoiseHandle(), vae)
    assert len(vae.arguments) == 1

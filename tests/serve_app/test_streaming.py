"""Tests of streaming: OpenAI's events from a running app."""

import base64
import io
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from openai import APIError, InternalServerError, OpenAI
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent
from PIL import Image

from tests.connections import ask, connect
from tests.keyed_app import ENDLESS
from tests.thorough import usually

pytestmark = pytest.mark.slow
Plain = Callable[..., Any]
Pixels = np.ndarray

PATH = "/v1/images/generations"


def stream(app: Any, prompt: str, **settings: Any) -> list[Any]:
    """Returns the events of one streaming call of the unmodified client."""
    ours = {"seed", "num_inference_steps", "progress", "guidance_scale", "negative_prompt", "true_cfg_scale"}
    extra = {name: settings.pop(name) for name in ours & settings.keys()}
    with OpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0) as client:
        return list(client.images.generate(prompt=prompt, stream=True, extra_body=extra, **settings))


def raw_events(app: Any, **fields: Any) -> Iterator[dict[str, Any]]:
    """Yields the events of the HTTP answer, without OpenAI's client."""
    with app.client.stream("POST", PATH, json={"prompt": "a cat", "stream": True} | fields) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def pixels(event: Any) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(event.b64_json))).convert("RGB")).astype(int)


def forming(pipe: Any, prompt: str, after: list[int], **settings: Any) -> list[Pixels]:
    """Returns the final image that plain diffusers predicts after each number of timesteps in `after`.

    For a flow model it is decoded from x - sigma v, where x and v are the transformer's input and output at that
    step.
    """
    seen: dict[str, Any] = {"pictures": []}

    def watch(_module: Any, _args: Any, inputs: dict[str, Any], output: Any) -> None:
        seen["latents"], seen["velocity"] = inputs["hidden_states"], output[0]

    def after_step(_pipe: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index + 1 in after:
            latents = tensors["latents"]
            if "velocity" in seen:
                latents = seen["latents"] - pipe.scheduler.sigmas[index] * seen["velocity"]
                latents = pipe._unpack_latents(latents, 64, 64, pipe.vae_scale_factor)
            config = pipe.vae.config
            image = pipe.vae.decode(latents / config.scaling_factor + (config.get("shift_factor") or 0))[0]
            [picture] = pipe.image_processor.postprocess(image.detach(), "pil")
            seen["pictures"].append(np.asarray(picture).astype(int))
        return {}

    model = getattr(pipe, "transformer", None)
    hook = model and model.register_forward_hook(watch, with_kwargs=True)
    tokens = {} if model is None else {"max_sequence_length": 64}
    generator = torch.Generator().manual_seed(settings.pop("seed"))
    settings = {"width": 64, "height": 64, "generator": generator, "output_type": "latent"} | tokens | settings
    pipe(prompt, callback_on_step_end=after_step, **settings)
    if hook:
        hook.remove()
    pictures: list[Pixels] = seen["pictures"]
    return pictures


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("name", "after"), usually([("flux_app", [16, 32]), ("sd15_app", [17, 33])], lambda of: of[0] == "flux_app")
)
def test_the_openai_client_sees_the_plain_pipelines_picture_form(
    request: pytest.FixtureRequest, plain: Plain, plain_pipeline: Any, name: str, after: list[int]
) -> None:
    """sd15's PNDM has 49 timesteps for 48 steps. With fewer steps a partial image may be left out, because the
    final image is ready sooner."""
    app = request.getfixturevalue(name)
    settings = {"seed": 7, "num_inference_steps": 48}
    *partials, completed = stream(app, "a red cat", partial_images=2, size="64x64", **settings)
    assert isinstance(completed, ImageGenCompletedEvent)
    assert all(isinstance(event, ImageGenPartialImageEvent) for event in partials)
    assert [event.partial_image_index for event in partials] == [0, 1]
    for event in [*partials, completed]:
        told = (event.size, event.quality, event.background, event.output_format, event.index)
        quality = "high" if event is completed else "auto"
        assert told == ("64x64", quality, "opaque", "png", 0)
        assert abs(event.created_at - time.time()) < 60
    assert completed.usage.total_tokens == 0
    assert completed.seed == 7
    assert completed.timings_ms.keys() == {"wake", "encode", "prepare", "queue", "denoise", "decode"}

    drawn = app.client.post(PATH, json={"prompt": "a red cat", "size": "64x64"} | settings).json()["data"][0]
    assert completed.b64_json == drawn["b64_json"]
    np.testing.assert_array_equal(pixels(completed), np.asarray(plain(app.family.name, "a red cat", **settings)))
    expected = forming(plain_pipeline(app.family.name), "a red cat", after, **settings)
    for event, picture in zip(partials, expected, strict=True):
        assert np.abs(pixels(event) - picture).max() <= 1
    assert np.abs(pixels(partials[0]) - pixels(completed)).max() > 5


def test_partial_pictures_have_the_format_asked_for(flux_app: Any) -> None:
    events = stream(flux_app, "a fish", partial_images=1, num_inference_steps=12, output_format="webp")
    formats = [Image.open(io.BytesIO(base64.b64decode(event.b64_json))).format for event in events]
    assert formats == ["WEBP", "WEBP"]


def test_a_stream_without_wishes_is_the_picture_alone(flux_app: Any) -> None:
    [event] = stream(flux_app, "a house", seed=3)
    assert isinstance(event, ImageGenCompletedEvent)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("name", usually(["flux_app", "sd15_app"], "flux_app".__eq__))
def test_progress_rises_to_the_last_step(request: pytest.FixtureRequest, name: str) -> None:
    app = request.getfixturevalue(name)
    fields = {"progress": True, "num_inference_steps": 30, "size": "256x256"}
    *progress, completed = raw_events(app, **fields)
    assert completed["type"] == "image_generation.completed"
    assert {event["type"] for event in progress} == {"image_generation.progress"}
    assert {event["num_steps"] for event in progress} == {30}
    steps = [event["step"] for event in progress]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 30)
    assert len(steps) > 3
    assert [event["phase"] for event in progress] == ["denoise"] * (len(steps) - 1) + ["decode"]
    assert all(event["eta_s"] is None if event["step"] == 0 else event["eta_s"] >= 0 for event in progress)
    assert any(event["eta_s"] for event in progress)


def test_the_openai_client_lets_progress_pass(flux_app: Any) -> None:
    events = stream(flux_app, "a tree", progress=True, num_inference_steps=5)
    assert [event.type for event in events][-1] == "image_generation.completed"
    assert events[0].type == "image_generation.progress"
    assert (events[0].step, events[0].num_steps) == (0, 5)


def test_each_of_n_pictures_has_its_own_events(flux_app: Any, plain: Plain) -> None:
    events = stream(flux_app, "two dogs", n=2, partial_images=2, seed=40, num_inference_steps=16)
    for i in range(2):
        *partials, completed = [event for event in events if event.index == i]
        assert [event.partial_image_index for event in partials] == sorted(range(len(partials)))
        assert partials
        assert completed.seed == 40 + i
        expected = np.asarray(plain("flux", "two dogs", seed=40 + i, num_inference_steps=16)).astype(int)
        assert np.abs(pixels(completed) - expected).max() <= 1


def test_sixteen_streams_at_once_see_their_own_pictures_form(
    flux_app: Any, plain: Plain, plain_pipeline: Any
) -> None:
    """The requests share forwards, and a batch rounds differently: one grey level of 255 is allowed."""
    settings = [{"seed": i, "num_inference_steps": 5 + i % 3} for i in range(16)]
    after = {5: [2, 3], 6: [2, 4], 7: [3, 5]}
    with ThreadPoolExecutor(16) as clients:
        answers = list(
            clients.map(lambda i: stream(flux_app, f"prompt {i % 5}", partial_images=2, **settings[i]), range(16))
        )
    num_partials = 0
    for i, (*partials, completed) in enumerate(answers):
        prompt = f"prompt {i % 5}"
        expected = np.asarray(plain("flux", prompt, **settings[i])).astype(int)
        assert np.abs(pixels(completed) - expected).max() <= 1
        forms = forming(plain_pipeline("flux"), prompt, after[5 + i % 3], **settings[i])
        for event in partials:
            assert np.abs(pixels(event) - forms[event.partial_image_index]).max() <= 1
        num_partials += len(partials)
    assert num_partials >= 8


def test_a_closed_connection_frees_its_seat_within_a_step(flux_app: Any, patient_app: Any) -> None:
    """At this size a step takes longer than the server needs to notice that the client has left."""
    fields = {"num_inference_steps": ENDLESS, "size": "512x512", "progress": True, "partial_images": 3}
    with closing(raw_events(patient_app, **fields)) as events:
        next(event for event in events if event["step"] > 0)
        flux_app.wait_for_seats(1)
    before = flux_app.deployment("Transformer").stats.remote().result().queue
    flux_app.wait_for_seats(0)
    after = flux_app.deployment("Transformer").stats.remote().result().queue
    assert after.num_micro_batches - before.num_micro_batches <= 1


def test_a_client_that_leaves_before_the_first_event_frees_its_seat(flux_app: Any, patient_app: Any) -> None:
    with connect(patient_app) as connection:
        ask(patient_app, connection, stream=True, num_inference_steps=ENDLESS)
        flux_app.wait_for_seats(1)
    flux_app.wait_for_seats(0)


def test_an_error_before_the_first_event_is_an_ordinary_answer(
    flux_app: Any, crossed_app: Any, narrow_app: Any
) -> None:
    with pytest.raises(InternalServerError, match="the decode stage failed: ValueError"):
        stream(crossed_app, "a cat", size="72x72", num_inference_steps=2)
    unknown = {"size": "64x80"}  # no test measures this size
    with closing(raw_events(narrow_app, num_inference_steps=ENDLESS, progress=True, **unknown)) as events:
        next(events)
        refused = narrow_app.client.post(PATH, json={"prompt": "a cat", "stream": True})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
        assert refused.json()["error"]["code"] == "overloaded"
    flux_app.wait_for_seats(0)


def test_a_deadline_is_a_504_before_the_first_event_and_an_error_event_after_it(
    flux_app: Any, hasty_app: Any
) -> None:
    with pytest.raises(InternalServerError) as before:
        stream(hasty_app, "a cat", num_inference_steps=ENDLESS)
    assert before.value.status_code == 504
    with pytest.raises(APIError, match=r"not done within request_timeout_s \(1 s\)") as after:
        stream(hasty_app, "a cat", num_inference_steps=ENDLESS, progress=True)
    assert after.value.body["code"] == "deadline_exceeded"
    flux_app.wait_for_seats(0)


def test_a_vae_that_dies_costs_partial_pictures_only(flux_app: Any, patient_app: Any, plain: Plain) -> None:
    settings = {"seed": 5, "num_inference_steps": 120}
    vae = flux_app.deployment("Vae").stats.remote().result().pid
    seen = []
    for event in raw_events(patient_app, partial_images=3, **settings):
        seen.append(event)
        if len(seen) == 1:
            os.kill(vae, signal.SIGKILL)
    *partials, completed = seen
    assert completed["type"] == "image_generation.completed"
    indices = [event["partial_image_index"] for event in partials]
    assert indices[0] == 0
    assert indices == sorted(set(indices))
    data = io.BytesIO(base64.b64decode(completed["b64_json"]))
    expected = plain("flux", "a cat", **settings)
    np.testing.assert_array_equal(np.asarray(Image.open(data)), np.asarray(expected))


def test_the_events_are_described(flux_app: Any) -> None:
    api = flux_app.client.get("/openapi.json").json()
    content = api["paths"][PATH]["post"]["responses"]["200"]["content"]
    assert content.keys() == {"application/json", "text/event-stream"}
    data = content["text/event-stream"]["itemSchema"]["properties"]["data"]
    name = data["contentSchema"]["$ref"].rpartition("/")[2]
    events = [option["$ref"].rpartition("/")[2] for option in api["components"]["schemas"][name]["anyOf"]]
    assert events == ["ProgressEvent", "PartialImageEvent", "CompletedEvent", "ErrorResponse"]
    text = json.dumps(api)
    for reference in {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert reference in api["components"]["schemas"]

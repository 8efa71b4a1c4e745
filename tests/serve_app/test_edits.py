"""Tests of input images over HTTP: the openai client gets what plain diffusers draws from them."""

import base64
import io
import re
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import diffusers
import numpy as np
import psutil
import pytest
import torch
from openai import BadRequestError, OpenAI
from openai.types import ImageEditCompletedEvent, ImageEditPartialImageEvent
from PIL import Image

from deployments.request import CallKind
from tests.conftest import TEXT_TOKENS
from tests.serve_app.pictures import SIDE, chunk, data_url, file, half_mask, noise, png_of

pytestmark = pytest.mark.slow
PATH = "/v1/images/edits"
OURS = {
    "seed",
    "strength",
    "num_inference_steps",
    "guidance_scale",
    "true_cfg_scale",
    "negative_prompt",
    "progress",
}
STEPS = {"num_inference_steps": 5, "strength": 0.8}


def edit(app: Any, prompt: str, **settings: Any) -> Any:
    """Makes one call of the unmodified client; fields that OpenAI does not know go into extra_body."""
    extra = {name: settings.pop(name) for name in OURS & settings.keys()}
    with OpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.images.edit(model=app.model.name, prompt=prompt, extra_body=extra, **settings)
        return list(answer) if settings.get("stream") else answer


def pixels(data: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.b64_json))).convert("RGB")).astype(int)


@pytest.fixture(scope="session")
def redraw(plain_pipeline: Callable[[str], Any]) -> Callable[..., np.ndarray]:
    """Returns `redraw(app, kind, prompt, image, seed=…, **settings)`, which draws with diffusers' own pipeline of
    that kind."""

    @cache
    def pipe(tiny: str, pipeline_class: str) -> Any:
        made = getattr(diffusers, pipeline_class)(**plain_pipeline(tiny).components)
        made.set_progress_bar_config(disable=True)
        return made

    def draw(app: Any, kind: CallKind, prompt: str, image: Any, *, seed: int, **settings: Any) -> np.ndarray:
        call = app.family.calls[kind]
        steps = {name: value for name, value in STEPS.items() if name in call.parameters}
        size = {"width": SIDE, "height": SIDE, "max_sequence_length": TEXT_TOKENS}
        generator = torch.Generator("cpu").manual_seed(seed)
        draws = pipe(app.model.checkpoint.removeprefix("tiny://"), call.pipeline_class)
        output = draws(prompt=prompt, image=image, generator=generator, **size | steps | settings)
        return np.asarray(output.images[0]).astype(int)

    return draw


Redraw = Callable[..., np.ndarray]


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("JPEG", {"quality": 90}), ("WEBP", {})])
def test_a_picture_is_drawn_anew_as_the_plain_pipeline_does(
    flux_app: Any, redraw: Redraw, kind: str, options: dict[str, Any]
) -> None:
    data = file(noise(), kind, **options)
    answer = edit(flux_app, "a red cat", image=("whatever.gif", data), seed=7, **STEPS)
    shown = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(pixels(answer.data[0]), redraw(flux_app, "edit", "a red cat", shown, seed=7))
    assert answer.size == "64x64"


def test_what_a_mask_says_is_filled_in_as_the_plain_pipeline_does(flux_app: Any, redraw: Redraw) -> None:
    white_is_anew = Image.fromarray(255 - np.asarray(half_mask())[..., 3])
    expected = redraw(flux_app, "inpaint", "a hat", noise(), seed=3, mask_image=white_is_anew)
    for mask in (half_mask(), white_is_anew):
        answer = edit(flux_app, "a hat", image=file(noise()), mask=file(mask), seed=3, **STEPS)
        np.testing.assert_array_equal(pixels(answer.data[0]), expected)


def test_json_with_data_urls_draws_what_a_form_draws(flux_app: Any) -> None:
    fields = {"prompt": "a hat", "seed": 3, **STEPS}
    sent = {"image": data_url(file(noise())), "mask": data_url(file(half_mask()))}
    answer = flux_app.client.post(PATH, json=fields | sent).json()
    form = edit(flux_app, "a hat", image=file(noise()), mask=file(half_mask()), seed=3, **STEPS)
    assert answer["data"][0]["b64_json"] == form.data[0].b64_json


def test_picture_i_of_n_has_seed_plus_i(flux_app: Any, redraw: Redraw) -> None:
    """The requests share forwards, and a batch rounds differently: one grey level of 255 is allowed."""
    answer = edit(flux_app, "two dogs", image=file(noise()), n=2, seed=40, **STEPS)
    assert [data.seed for data in answer.data] == [40, 41]
    for data in answer.data:
        expected = redraw(flux_app, "edit", "two dogs", noise(), seed=data.seed)
        assert np.abs(pixels(data) - expected).max() <= 1


def test_the_openai_client_sees_an_edit_form(flux_app: Any, redraw: Redraw) -> None:
    settings = {"num_inference_steps": 45, "strength": 0.8, "seed": 9}  # enough steps for both partial images
    events = edit(
        flux_app, "a fish", image=file(noise()), stream=True, partial_images=2, progress=True, **settings
    )
    progress = [event for event in events if event.type == "image_edit.progress"]
    partials = [event for event in events if event.type == "image_edit.partial_image"]
    completed = events[-1]
    assert len(events) == len(progress) + len(partials) + 1
    assert progress
    assert all(isinstance(event, ImageEditPartialImageEvent) for event in partials)
    assert [event.partial_image_index for event in partials] == [0, 1]
    assert isinstance(completed, ImageEditCompletedEvent)
    assert (completed.type, completed.size, completed.seed) == ("image_edit.completed", "64x64", 9)
    np.testing.assert_array_equal(pixels(completed), redraw(flux_app, "edit", "a fish", noise(), **settings))


@pytest.fixture(scope="session")
def klein_app(start_app: Callable[..., Any]) -> Any:
    """An app of FLUX.2 klein, which makes one image from several, over two shards."""
    return start_app("flux2-klein", shards=2)


LOUD = {"guidance_scale": 40.0}
"""High guidance: a tiny klein, whose weights are random, then draws different images from different inputs."""


@pytest.mark.thorough
def test_the_openai_client_sees_one_picture_of_two_form(klein_app: Any, redraw: Redraw) -> None:
    settings, images = {"num_inference_steps": 40, "seed": 9, **LOUD}, [noise(1), noise(2)]
    files = [file(image) for image in images]
    *partials, completed = edit(klein_app, "a hat", image=files, stream=True, partial_images=2, **settings)
    assert [event.partial_image_index for event in partials] == [0, 1]
    expected, swapped = (
        redraw(klein_app, "edit", "a hat", put_in, **settings) for put_in in (images, images[::-1])
    )
    np.testing.assert_array_equal(pixels(completed), expected)
    assert np.abs(swapped - expected).max() > 1


@pytest.mark.thorough
def test_eight_at_once_over_two_shards_get_their_own_pictures(klein_app: Any, redraw: Redraw) -> None:
    """The requests take one image, two images, or one image and a mask."""
    white_is_anew = Image.fromarray(255 - np.asarray(half_mask())[..., 3])

    def ask(i: int) -> Any:
        by_mask = {"mask": file(half_mask()), "strength": STEPS["strength"]} if i % 3 == 2 else {}
        asked = {"seed": i % 4, "num_inference_steps": STEPS["num_inference_steps"], **LOUD, **by_mask}
        return edit(klein_app, f"prompt {i % 2}", image=[file(each) for each in images(i)], **asked).data[0]

    def images(i: int) -> list[Image.Image]:
        return [noise(10 * i + place) for place in range(2 if i % 3 == 1 else 1)]

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(ask, range(8)))
    for i, data in enumerate(answers):
        kind, mask = ("inpaint", {"mask_image": white_is_anew}) if i % 3 == 2 else ("edit", {})
        expected, of_another = (
            redraw(klein_app, kind, f"prompt {i % 2}", images(of), seed=i % 4, **LOUD, **mask) for of in (i, i + 3)
        )
        assert np.abs(pixels(data) - expected).max() <= 1
        assert np.abs(of_another - expected).max() > 1


def test_a_repeated_picture_costs_no_forward_of_the_vae_or_the_encoder(flux_app: Any) -> None:
    first = edit(flux_app, "seen twice", image=file(noise(77)), seed=1, **STEPS)
    before = flux_app.deployment("Encoder").stats.remote().result()
    again = edit(flux_app, "seen twice", image=file(noise(77)), seed=1, **STEPS)
    assert flux_app.deployment("Encoder").stats.remote().result().num_forwards == before.num_forwards
    assert again.data[0].b64_json == first.data[0].b64_json


def test_a_handle_takes_bytes_and_gives_what_http_gives(flux_app: Any) -> None:
    fields = {"prompt": "a hat", "seed": 3, "image": file(noise()), "mask": file(half_mask()), **STEPS}
    [picture] = flux_app.handle.generate.remote(**fields).result()
    *_, last = flux_app.handle.options(stream=True).stream.remote(**fields)
    answer = edit(flux_app, **fields)
    assert picture.media.data == last.payload.media.data == base64.b64decode(answer.data[0].b64_json)


def test_pixels_that_are_broken_behind_a_good_header_are_a_400(flux_app: Any) -> None:
    whole = file(noise(size=(512, 512)))
    with pytest.raises(BadRequestError, match="image: it cannot be read") as refused:
        edit(flux_app, "a cat", image=whole[: len(whole) // 2], **STEPS)
    assert refused.value.param == "image"
    with pytest.raises(BadRequestError, match="mask: it cannot be read") as refused:
        edit(flux_app, "a cat", image=file(noise(size=(512, 512))), mask=whole[: len(whole) // 2], **STEPS)
    assert refused.value.param == "mask"


@cache
def bombs() -> list[tuple[bytes, int]]:
    """Returns files that expand to much more than their size or are broken, and the expected status of each."""
    wide = png_of(4999, 5000, chunk(b"IDAT", zlib.compress(bytes(5000 * 5000), 9)))
    more_than_wanted = png_of(SIDE, SIDE, chunk(b"IDAT", zlib.compress(bytes(2**26), 9)))
    texts = [chunk(b"zTXt", b"C\0\0" + zlib.compress(bytes(2**19), 9))] * 200
    return [
        (wide, 200),
        (more_than_wanted, 200),
        (png_of(SIDE, SIDE, *texts, chunk(b"IDAT", zlib.compress(bytes(SIDE * SIDE + SIDE), 9))), 400),
        (png_of(SIDE, SIDE, chunk(b"IDAT", zlib.compress(bytes(SIDE * SIDE + SIDE), 9)), *texts), 400),
        (png_of(SIDE, SIDE, chunk(b"IDAT", b"no zlib")), 400),
        (png_of(20_000, 20_000), 400),
        (bytes(20 * 2**20), 400),
        (file(noise(), "GIF"), 400),
        (file(noise(size=(512, 512)))[:300_000], 400),
    ]


def test_bombs_are_a_400_or_a_picture_and_memory_stays_flat(flux_app: Any) -> None:
    def throw() -> None:
        fields = {"prompt": "a cat", "num_inference_steps": "2", "strength": "0.5"}
        for data, status in bombs():
            answer = flux_app.client.post(PATH, data=fields, files={"image": ("cat.png", data)})
            assert answer.status_code == status, answer.text
            if status == 400:
                assert answer.json()["error"]["param"] == "image"

    throw()
    before = resident(flux_app)
    for _ in range(5):
        throw()
    after = resident(flux_app)
    assert before.keys() == after.keys()
    assert len(before) >= 4
    grown = {name: (after[name] - before[name]) / 2**20 for name in before}
    assert max(grown.values()) < 300, (
        grown
    )  # a leak of one 25 MP image would be 75 MB, of all that were sent over 1 GB


def resident(app: Any) -> dict[str, int]:
    """Returns the resident bytes of each of the app's replicas, without shared memory: each maps what it has read
    from the object store."""
    mine = f"ServeReplica:{app.name}:"
    found = {}
    for process in psutil.process_iter(["cmdline", "memory_info"]):
        title = " ".join(process.info["cmdline"] or ())
        if mine in title:
            memory = process.info["memory_info"]
            deployment = re.split(r"\W", title.partition(mine)[2])[0]  # the method's name follows
            found[f"{deployment} {process.pid}"] = memory.rss - memory.shared
    return found

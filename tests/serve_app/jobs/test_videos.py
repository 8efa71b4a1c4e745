"""Tests that OpenAI's unmodified client makes videos as jobs of a running app."""

import base64
import time
import warnings
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from PIL import Image

from tests.app import PATIENCE_S, App
from tests.keyed_app import ENDLESS

pytestmark = pytest.mark.slow
FIELDS = {"prompt": "waves", "size": "64x64", "extra_body": {"num_frames": 5, "seed": 9}}


@pytest.fixture(autouse=True)
def _old_but_good() -> Iterator[None]:
    """Ignores deprecation warnings of the client's methods: OpenAI is ending its own video service."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, message="The Sora API")
        yield


@pytest.fixture
def client(wan_app: App) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{wan_app.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(png))).astype(int)


def test_a_video_is_created_polled_downloaded_and_deleted(wan_app: App, client: OpenAI) -> None:
    made = client.videos.create_and_poll(**FIELDS)
    assert (made.status, made.progress, made.size, made.error) == ("completed", 100, "64x64", None)
    same = {"prompt": "waves", "size": "64x64", "num_frames": 5, "seed": 9}
    expected = wan_app.client.post("/v1/videos/sync", json=same).content
    content = client.videos.download_content(made.id)
    assert content.read() == expected
    assert content.response.headers["content-type"] == "video/mp4"
    still = client.videos.download_content(made.id, variant="thumbnail")
    assert still.response.headers["content-type"] == "image/webp"
    with Image.open(BytesIO(still.read())) as picture:
        assert (picture.format, picture.size) == ("WEBP", (64, 64))
    part = client.videos.download_content(made.id, extra_headers={"Range": "bytes=10-19"})
    assert (part.response.status_code, part.read()) == (206, expected[10:20])
    assert client.videos.retrieve(made.id) == made
    assert client.videos.delete(made.id).deleted
    with pytest.raises(NotFoundError):
        client.videos.retrieve(made.id)


def test_its_stage_writes_it_and_the_ingress_never_has_it(wan_app: App, client: OpenAI) -> None:
    def num_written() -> int:
        num: int = wan_app.deployment("Vae").stats.remote().result().num_written
        return num

    before = num_written()
    assert client.videos.create_and_poll(**FIELDS).status == "completed"
    assert num_written() == before + 1


def test_a_picture_goes_in_and_a_video_comes_of_a_video(client: OpenAI) -> None:
    made = client.videos.create_and_poll(**FIELDS)
    film = client.videos.download_content(made.id).read()
    remix = client.videos.poll(client.videos.remix(made.id, prompt="a storm").id)
    assert (remix.status, remix.remixed_from_video_id, remix.prompt) == ("completed", made.id, "a storm")
    assert client.videos.download_content(remix.id).read() != film
    again = client.videos.create_and_poll(prompt="a storm", input_reference=("waves.mp4", film), size="64x64")
    assert again.status == "completed"


def test_pages_are_read_through(client: OpenAI) -> None:
    made = [client.videos.create(**FIELDS).id for _ in range(3)]
    listed = [video.id for video in client.videos.list(limit=2)]
    assert [each for each in listed if each in made] == made[::-1]
    for each in made:
        client.videos.poll(each)
        client.videos.delete(each)


def test_a_wrong_field_is_told_at_once(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as wrong:
        client.videos.create(prompt="waves", size="64x72")  # type: ignore[arg-type]
    assert wrong.value.param == "size"


def test_a_job_that_is_deleted_while_it_runs_frees_its_seat(flux_app: App, patient_app: App) -> None:
    fields = {"prompt": "a cat", "num_inference_steps": ENDLESS, "background": True}
    answer = patient_app.client.post("/v1/images/generations", json=fields)
    assert answer.status_code == 202, answer.text
    path = f"/v1/images/jobs/{answer.json()['id']}"
    flux_app.wait_for_seats(1)
    assert patient_app.client.delete(path).json()["deleted"]
    flux_app.wait_for_seats(0)
    assert patient_app.client.get(path).json()["status"] == "cancelled"


def test_pictures_of_a_job_are_those_of_a_request(flux_app: App) -> None:
    """The two images may share a batch in one case and not in the other: they may differ by one grey level."""
    fields = {"prompt": "a cat", "n": 2, "seed": 3}
    pictures = flux_app.client.post("/v1/images/generations", json=fields).json()["data"]
    made = flux_app.client.post("/v1/images/generations", json=fields | {"background": True}).json()
    path = f"/v1/images/jobs/{made['id']}"
    told = finished(lambda: flux_app.client.get(path).json())
    assert told["status"] == "completed"
    assert [each["seed"] for each in told["data"]] == [3, 4]
    for i, picture in enumerate(pictures):
        content = flux_app.client.get(f"{path}/content", params={"index": i})
        assert content.headers["content-type"] == "image/png"
        assert np.abs(pixels(content.content) - pixels(base64.b64decode(picture["b64_json"]))).max() <= 1


def finished(look: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while (told := look())["status"] in ("queued", "in_progress"):
        assert time.monotonic() < deadline, told
        time.sleep(0.1)
    return told

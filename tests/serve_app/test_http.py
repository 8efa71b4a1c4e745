"""Tests that the openai client gets from a running app what plain diffusers draws."""

import base64
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import av
import httpx
import numpy as np
import psutil
import pytest
import torch
from diffusers import WanVideoToVideoPipeline
from openai import OpenAI
from PIL import Image

from deployments.media.pixels import encode_media
from deployments.media.video_file import read_frames
from tests.conftest import TEXT_TOKENS
from tests.pictures import video

pytestmark = pytest.mark.slow
Plain = Callable[..., Any]


def generate(app: Any, prompt: str, **settings: Any) -> Any:
    """Makes one call of the unmodified client; fields that OpenAI does not know go into extra_body."""
    ours = {"seed", "negative_prompt", "num_inference_steps", "guidance_scale", "true_cfg_scale"}
    extra = {name: settings.pop(name) for name in ours & settings.keys()}
    with OpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0) as client:
        return client.images.generate(model=f"tiny-{app.family.name}", prompt=prompt, extra_body=extra, **settings)


def pixels(data: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.b64_json))).convert("RGB")).astype(int)


@pytest.fixture(params=["flux_app", "sd15_app"])
def image_app(request: pytest.FixtureRequest, ray_cluster: None) -> Any:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 64)])
def test_a_picture_over_http_is_the_plain_pipelines(image_app: Any, plain: Plain, width: int, height: int) -> None:
    settings = {
        "seed": 7,
        "negative_prompt": "blurry",
        image_app.family.call.guidance: 3.0,
        "num_inference_steps": 3,
    }
    answer = generate(image_app, "a red cat", size=f"{width}x{height}", **settings)
    expected = plain(image_app.family.name, "a red cat", width=width, height=height, **settings)
    np.testing.assert_array_equal(pixels(answer.data[0]), np.asarray(expected).astype(int))


def test_picture_i_of_n_has_seed_plus_i(image_app: Any, plain: Plain) -> None:
    """The three images share forwards, and a batch rounds differently: one grey level of 255 is allowed."""
    answer = generate(image_app, "two dogs", n=3, seed=40)
    assert [data.seed for data in answer.data] == [40, 41, 42]
    for data in answer.data:
        expected = np.asarray(plain(image_app.family.name, "two dogs", seed=data.seed)).astype(int)
        assert np.abs(pixels(data) - expected).max() <= 1


@pytest.mark.parametrize(
    ("output_format", "compression", "options"),
    [
        ("png", 100, {"compress_level": 1}),
        ("jpeg", 80, {"quality": 80}),
        ("webp", 60, {"quality": 60, "lossless": False, "method": 2}),
        ("webp", 100, {"quality": 100, "lossless": True, "method": 2}),
    ],
)
def test_each_format_holds_the_same_picture(
    image_app: Any, plain: Plain, output_format: str, compression: int, options: dict[str, Any]
) -> None:
    answer = generate(image_app, "a fish", seed=1, output_format=output_format, output_compression=compression)
    file = io.BytesIO()
    plain(image_app.family.name, "a fish", seed=1).save(file, output_format, **options)
    assert base64.b64decode(answer.data[0].b64_json) == file.getvalue()


def test_sixteen_clients_at_once_get_their_own_pictures(flux_app: Any, plain: Plain) -> None:
    def ask(seed: int) -> tuple[int, Any]:
        return seed, generate(flux_app, f"prompt {seed % 3}", seed=seed, num_inference_steps=3 + seed % 3)

    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(ask, range(16)))
    for seed, answer in answers:
        settings = {"seed": seed, "num_inference_steps": 3 + seed % 3}
        expected = np.asarray(plain("flux", f"prompt {seed % 3}", **settings)).astype(int)
        assert np.abs(pixels(answer.data[0]) - expected).max() <= 1


def test_the_answer_tells_seed_size_and_time_per_stage(flux_app: Any) -> None:
    answer = flux_app.client.post("/v1/images/generations", json={"prompt": "a house"}).json()
    assert answer["created"] > 1_700_000_000
    assert answer["size"] == "64x64"
    [data] = answer["data"]
    assert 0 <= data["seed"] < 2**31
    assert data["timings_ms"].keys() == {"wake", "encode", "prepare", "queue", "denoise", "decode"}
    assert data["timings_ms"]["denoise"] > 0


def test_a_repeated_prompt_costs_no_encoder_forward(flux_app: Any) -> None:
    encoder = flux_app.deployment("Encoder")
    generate(flux_app, "asked twice", seed=1)
    before = encoder.stats.remote().result()
    generate(flux_app, "asked twice", seed=2)
    after = encoder.stats.remote().result()
    assert after.num_forwards == before.num_forwards
    assert after.num_cache_hits == before.num_cache_hits + 1


def test_the_ingress_loads_no_torch(flux_app: Any) -> None:
    generate(flux_app, "a tree", seed=1)
    ingress = [p for p in psutil.process_iter(["cmdline"]) if ":Ingress" in " ".join(p.info["cmdline"] or ())]
    assert ingress
    for process in ingress:
        assert not [file.path for file in process.memory_maps() if "libtorch" in file.path]


@pytest.mark.parametrize("body", ["json", "form"])
def test_a_video_over_http_is_the_plain_pipelines(wan_app: Any, plain: Plain, body: str) -> None:
    fields = {"prompt": "waves", "size": "64x64", "num_frames": 5, "seed": 9, "guidance_scale": 3.0}
    sent = {"json": fields} if body == "json" else {"files": {k: (None, str(v)) for k, v in fields.items()}}
    answer = wan_app.client.post("/v1/videos/sync", **sent)
    assert answer.headers["content-type"] == "video/mp4"
    assert answer.headers["x-seed"] == "9"
    assert "denoise;dur=" in answer.headers["server-timing"]
    with av.open(io.BytesIO(answer.content)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    expected = plain("wan", "waves", seed=9, guidance_scale=3.0, output_type="np") * 255
    assert frames.shape == (5, 64, 64, 3)
    # H.264 halves the colour resolution, and these images are noise: only their brightness must agree
    assert np.abs(frames.mean(axis=3) - expected.mean(axis=3)).mean() < 12


def test_the_openai_client_gets_a_video_as_the_readme_tells(wan_app: Any) -> None:
    fields = {"prompt": "waves", "size": "64x64", "num_frames": 5, "seed": 9}
    with OpenAI(base_url=f"{wan_app.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.post("/videos/sync", cast_to=httpx.Response, body=fields)
    assert answer.content == wan_app.client.post("/v1/videos/sync", json=fields).content


def test_seconds_are_rounded_to_a_number_of_frames_the_model_can_make(wan_app: Any) -> None:
    answer = wan_app.client.post("/v1/videos/sync", json={"prompt": "waves", "seconds": 0.5, "fps": 16, "seed": 1})
    with av.open(io.BytesIO(answer.content)) as container:
        assert len(list(container.decode(video=0))) == 9


def test_a_video_that_goes_in_is_drawn_anew_as_the_plain_pipeline_draws_it(
    wan_app: Any, plain_pipeline: Callable[[str], Any]
) -> None:
    film, settings = video(7, (96, 64), fps=12), {"strength": 0.8, "num_inference_steps": 5}
    fields = {"prompt": "waves", "size": "64x64", "seed": 9} | settings
    files = {key: (None, str(value)) for key, value in fields.items()}
    answer = wan_app.client.post("/v1/videos/sync", files=files | {"input_reference": ("waves.mp4", film)})
    assert answer.status_code == 200, answer.text
    pipe = WanVideoToVideoPipeline.from_pipe(plain_pipeline("wan"))
    pipe.set_progress_bar_config(disable=True)
    [expected] = pipe(
        list(read_frames(film))[:5],
        prompt="waves",
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(9),
        max_sequence_length=TEXT_TOKENS,
        **settings,
    ).frames
    frames = (expected * 255).round().astype(np.uint8)
    assert answer.content == encode_media(frames, "mp4", compression=100, fps=12)


def test_a_video_that_breaks_off_is_the_clients_mistake(wan_app: Any) -> None:
    film = video(9, container="matroska")
    broken = film[:-2000] + bytes(2000)
    answer = wan_app.client.post(
        "/v1/videos/sync",
        files={"prompt": (None, "waves"), "num_frames": (None, "9"), "input_reference": ("x.mkv", broken)},
    )
    assert (answer.status_code, answer.json()["error"]["param"]) in ((400, "input_reference"), (400, "num_frames"))


def test_models_and_health(flux_app: Any, wan_app: Any) -> None:
    [model] = flux_app.client.get("/v1/models").json()["data"]
    assert (model["id"], model["family"], model["media"]) == ("tiny-flux", "flux", "image")
    assert flux_app.client.get("/v1/models/tiny-flux").json() == model
    assert wan_app.client.get("/v1/models").json()["data"][0]["media"] == "video"
    health = flux_app.client.get("/health")
    assert health.status_code == 200
    assert health.json() == {"ok": True, "stages": {"encoder": "ok", "transformer": "ok", "vae": "ok"}}


def test_the_api_is_described(flux_app: Any) -> None:
    paths = flux_app.client.get("/openapi.json").json()["paths"]
    assert {"/v1/images/generations", "/v1/models", "/health"} <= paths.keys()
    assert flux_app.client.get("/docs").status_code == 200

"""The decode stage's deployment, as a plain object without a cluster."""

import asyncio
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from deployments.answers import DecodeArguments, Media
from deployments.config.model import ModelConfig
from deployments.config.vae import VaeConfig
from deployments.options.qos import Qos
from deployments.request import GenerationRequest, OutputFormat, Prompt
from deployments.stages.decode import Decoding
from deployments.vae import Vae
from tests.deployments.held import ended_in

LATENTS = {"flux": (1, 16, 6, 8), "sd15": (1, 4, 6, 8), "wan": (1, 16, 2, 6, 8)}
"""Shapes of latents for 64 x 48 pixels; Wan's are for five frames."""


def build_model(family: str) -> ModelConfig:
    return ModelConfig(name="tiny", checkpoint=f"tiny://{family}", family=family)


def build_request(output_format: OutputFormat, output_compression: int = 100) -> GenerationRequest:
    prompt = Prompt("a red fox", None, is_guided=False)
    return GenerationRequest(prompt, 64, 48, 5, 3, None, None, 0, output_format, output_compression, fps=8)


def build_latents(family: str) -> DecodeArguments:
    return DecodeArguments.of(torch.randn(LATENTS[family], generator=torch.Generator().manual_seed(0)))


def decode(family: str, request: GenerationRequest) -> tuple[Media, Any]:
    """Returns the file that the deployment makes of some latents, and the frames before they were encoded."""
    vae, stage = Vae(build_model(family), VaeConfig()), Decoding(build_model(family), VaeConfig())
    latents = build_latents(family)
    return asyncio.run(vae.decode(latents, request)), stage.decode(latents, request)


@pytest.mark.parametrize("family", ["flux", "sd15"])
def test_a_picture_is_a_file_of_the_decoded_pixels(family: str) -> None:
    media, frames = decode(family, build_request("png"))
    assert media.media_type == "image/png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(media.data))), frames[0])
    assert frames.shape == (1, 48, 64, 3)
    assert frames.std() > 10


def test_one_image_waits_for_no_crowd_of_videos() -> None:
    vae, video, latents = Vae(build_model("wan"), VaeConfig()), build_request("mp4"), build_latents("wan")
    image = replace(video, num_frames=1, output_format="png")
    one_frame = DecodeArguments.of(latents.latents[:, :, :1].contiguous())
    calls = [("video", vae.decode(latents, video, None, Qos(share="crowd"))) for _ in range(4)]
    calls += [("image", vae.decode(one_frame, image, None, Qos(share="alone"))) for _ in range(3)]
    assert asyncio.run(ended_in(vae._executor, calls)) == ["video", *["image"] * 3, *["video"] * 3]


def test_the_requests_compression_is_used() -> None:
    media, [frame] = decode("flux", build_request("jpeg", 40))
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "jpeg", quality=40)
    assert (media.media_type, media.data) == ("image/jpeg", file.getvalue())


def test_a_video_is_an_mp4_of_the_decoded_frames() -> None:
    media, frames = decode("wan", build_request("mp4"))
    assert media.media_type == "video/mp4"
    with av.open(io.BytesIO(media.data)) as container:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert decoded.shape == frames.shape == (5, 48, 64, 3)


def test_a_video_is_written_to_its_target_and_answered_without_its_bytes(tmp_path: Path) -> None:
    vae, latents, request = Vae(build_model("wan"), VaeConfig()), build_latents("wan"), build_request("mp4")
    expected = asyncio.run(vae.decode(latents, request)).data
    media = asyncio.run(vae.decode(latents, request, f"file://{tmp_path}/video.mp4"))
    assert (media.data, media.num_written, media.media_type) == (b"", len(expected), "video/mp4")
    assert {path.name for path in tmp_path.iterdir()} == {"video.mp4", "video.mp4.webp"}
    assert (tmp_path / "video.mp4").read_bytes() == expected


def test_a_target_that_is_not_on_this_machine_is_answered_with_the_bytes(tmp_path: Path) -> None:
    vae, latents, request = Vae(build_model("sd15"), VaeConfig()), build_latents("sd15"), build_request("png")
    media = asyncio.run(vae.decode(latents, request, f"file://{tmp_path}/elsewhere/picture.png"))
    assert media == replace(asyncio.run(vae.decode(latents, request)), decode_ms=media.decode_ms)
    assert list(tmp_path.iterdir()) == []


def test_latents_that_may_not_be_written_to_are_left_as_they_are() -> None:
    """Latents come from Ray as read-only views of shared memory."""
    vae, latents = Vae(build_model("sd15"), VaeConfig()), build_latents("sd15")
    before = latents.latents.clone()
    asyncio.run(vae.decode(latents, build_request("png")))
    assert torch.equal(latents.latents, before)


def test_the_vae_tells_how_long_it_took() -> None:
    media, _ = decode("sd15", build_request("png"))
    assert media.decode_ms > 0


def test_a_partial_picture_is_decoded_like_a_picture() -> None:
    vae, latents, request = (
        Vae(build_model("sd15"), VaeConfig()),
        build_latents("sd15"),
        build_request("png"),
    )
    partial, picture = (asyncio.run(decode(latents, request)) for decode in (vae.decode_partial, vae.decode))
    assert partial is not None
    assert partial.data == picture.data


def test_pictures_go_before_partial_pictures_that_came_first() -> None:
    """Images keep this precedence as long as any wait: here each arrives while another waits."""
    vae, latents, request = (
        Vae(build_model("sd15"), VaeConfig()),
        build_latents("sd15"),
        build_request("png"),
    )
    done: list[str] = []

    async def note(name: str, decoding: Any) -> None:
        await decoding
        done.append(name)

    async def run() -> None:
        running = note("running", vae.decode_partial(latents, request))
        partials = [note("partial", vae.decode_partial(latents, request)) for _ in range(2)]
        await asyncio.gather(running, *partials, pictures())

    async def pictures() -> None:
        waiting = [asyncio.create_task(note("picture", vae.decode(latents, request)))]
        for _ in range(4):
            waiting.append(asyncio.create_task(note("picture", vae.decode(latents, request))))
            await waiting.pop(0)
        await waiting.pop()

    asyncio.run(run())
    assert done == ["running", *["picture"] * 5, "partial", "partial"]


def test_partial_pictures_never_fill_the_places_of_pictures() -> None:
    vae = Vae(build_model("sd15"), VaeConfig(max_ongoing_requests=4))
    latents, request = build_latents("sd15"), build_request("png")

    async def run() -> list[Media | None]:
        return await asyncio.gather(*(vae.decode_partial(latents, request) for _ in range(4)))

    assert [media is None for media in asyncio.run(run())] == [False, False, True, True]

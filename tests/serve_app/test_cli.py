"""Tests of `relay` as a shell runs it."""

import io
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pytest
import ray
import torch
from diffusers import FluxPipeline
from PIL import Image
from ray import serve
from typer.testing import CliRunner

from deployments.checkpoints.source import fetch_checkpoint
from deployments.media.video_file import read_frames
from serve_app.cli import cli, main
from serve_app.commands.generate import choose_file, read_files
from serve_app.config.app import ConfigError
from serve_app.config.serve_file import APP_NAME
from tests.keyed_app import ENDLESS, FOREVER_S
from tests.serve_app.pictures import file, half_mask, noise
from tests.thorough import usually

pytestmark = pytest.mark.slow

MARK = "LATENT_RELAY_TEST"
ROOT = Path(__file__).parent.parent.parent
RELAY = str(Path(sys.executable).with_name("relay"))
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")


def relay(
    *args: str, ray_address: str = "local", mark: str = "", cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Runs `relay`.

    ray_address: where it looks for a running app.
    mark: is in its environment and in that of every process that it starts.
    """
    env = os.environ | {"RAY_ADDRESS": ray_address, "COLUMNS": "200", "NO_COLOR": "1", MARK: mark}
    return subprocess.run([RELAY, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command, in this process, that fails before it starts anything; returns its error on one line."""

    def told(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["relay", *args])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    return told


@pytest.fixture(scope="module")
def address(ray_cluster: None) -> str:
    found: str = ray.get_runtime_context().gcs_address
    return found


@pytest.fixture(scope="module")
def relay_app(start_ingress: Callable[..., Any]) -> Any:
    """An app with the name that the command looks for."""
    return start_ingress(APP_NAME, max_num_inference_steps=ENDLESS, request_timeout_s=FOREVER_S)


def test_tiny_writes_a_checkpoint_that_diffusers_lays_out(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["tiny", "sd15", str(tmp_path / "sd15")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert {"model_index.json", "unet", "vae", "text_encoder"} <= {p.name for p in (tmp_path / "sd15").iterdir()}
    assert "wrote" in done.output


def test_tiny_names_the_families_when_asked_for_another(refused: Callable[..., str]) -> None:
    assert "allowed: flux, sd15, sdxl, sd3, qwen-image, wan" in refused("tiny", "dalle", "/nowhere")


def test_train_shapes_refuses_a_folder_whose_checkpoint_is_complete(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "shapes").mkdir()
    told = refused("train-shapes", str(tmp_path))
    assert told.endswith("shapes is complete; remove it, or name another folder")


@pytest.mark.thorough
def test_generate_starts_an_app_of_its_own_and_leaves_no_process(tmp_path: Path) -> None:
    out = tmp_path / "circle.png"
    prompt = "a red circle"
    mark = uuid.uuid4().hex
    options = ["--config", QUICKSTART, "--seed", "7", "--steps", "3", "--out", str(out)]
    done = relay("generate", prompt, *options, mark=mark)
    assert done.returncode == 0, done.stderr
    assert "image/png, seed 7" in done.stderr
    plain = FluxPipeline.from_pretrained(fetch_checkpoint("embedded://shapes", ()))
    settings = {"width": 128, "height": 128, "num_inference_steps": 3, "max_sequence_length": 32}
    settings |= {"true_cfg_scale": 1.5, "negative_prompt": ""}
    [expected] = plain(prompt, generator=torch.Generator().manual_seed(7), **settings).images
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(expected))
    assert [p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get(MARK) == mark] == []


def test_generate_says_so_when_no_app_runs(address: str, tmp_path: Path) -> None:
    done = relay("generate", "a fox", "--out", str(tmp_path / "fox.png"), ray_address=address)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "relay: no running app found: start one (`relay serve CONFIG`), or name a --config to start"
    )


def test_generate_asks_the_running_app(relay_app: Any, address: str, tmp_path: Path) -> None:
    out = tmp_path / "fox.webp"
    fields = {"seed": "7", "steps": "3", "size": "64x64", "guidance-scale": "2.5", "strength": "0.8"}
    options = [word for name, value in fields.items() for word in (f"--{name}", value)]
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    image.write_bytes(file(noise()))
    mask.write_bytes(file(half_mask()))
    files = ["--image", str(image), "--mask", str(mask)]
    done = relay("generate", "a fox", *options, *files, "--out", str(out), ray_address=address)
    assert done.returncode == 0, done.stderr
    [picture] = relay_app.handle.generate.remote(
        prompt="a fox",
        seed=7,
        num_inference_steps=3,
        size="64x64",
        guidance_scale=2.5,
        strength=0.8,
        output_format="webp",
        image=image.read_bytes(),
        mask=mask.read_bytes(),
    ).result()
    assert out.read_bytes() == picture.media.data
    assert Image.open(io.BytesIO(picture.media.data)).format == "WEBP"


@pytest.mark.parametrize("end", usually([signal.SIGINT, signal.SIGTERM, signal.SIGHUP], signal.SIGHUP.__ne__))
def test_generate_that_is_ended_ends_its_request(
    flux_app: Any, relay_app: Any, address: str, tmp_path: Path, end: signal.Signals
) -> None:
    command = [RELAY, "generate", "a fox", "--steps", str(ENDLESS), "--out", str(tmp_path / "fox.png")]
    waiting = subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": address}, stderr=subprocess.DEVNULL)
    try:
        flux_app.wait_for_seats(1)
        waiting.send_signal(end)
        assert waiting.wait(60) != 0
    finally:
        waiting.kill()  # a shell's background jobs ignore some signals: the request would never end
    flux_app.wait_for_seats(0)


def test_what_the_running_app_refuses_is_told_in_one_line(relay_app: Any, address: str, tmp_path: Path) -> None:
    out = tmp_path / "fox.png"
    done = relay("generate", "a fox", "--size", "65x64", "--out", str(out), ray_address=address)
    assert done.returncode == 2
    expected = "relay: size: width and height must be multiples of 16, got 65x64; nearest: 64x64"
    assert done.stderr.strip() == expected
    assert not out.exists()


def test_a_video_models_file_is_an_mp4(
    wan_app: Any, start_ingress: Callable[..., Any], address: str, tmp_path: Path
) -> None:
    """The app replaces the one of earlier tests, if there is one."""
    start_ingress(APP_NAME, family="wan", stages_of=wan_app)
    try:
        asked = ["generate", "waves", "--seconds", "1.2", "--fps", "4", "--steps", "1"]
        done = relay(*asked, ray_address=address, cwd=tmp_path)
        refused = relay(*asked, "--guidance-scale-2", "2", ray_address=address, cwd=tmp_path)
    finally:
        serve.delete(APP_NAME)
    assert done.returncode == 0, done.stderr
    video = (tmp_path / "out.mp4").read_bytes()
    assert b"ftyp" in video[:12]
    assert len(list(read_frames(video))) == 5
    assert refused.returncode == 2
    assert "does not take this guidance_scale_2" in refused.stderr  # only a second expert has this scale


@pytest.mark.parametrize(
    ("media", "out", "message"),
    [
        ("image", "x.gif", "this model makes images; the file must end in .png, .jpg, .jpeg, .webp"),
        ("image", "x.mp4", "this model makes images"),
        ("image", "x", "the file must end in"),
        ("video", "x.png", "this model makes videos; the file must end in .mp4"),
        ("image", "no/such/folder/x.png", "the folder no/such/folder does not exist"),
    ],
)
def test_a_file_that_cannot_be_what_its_name_says_is_refused(
    media: Literal["image", "video"], out: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        choose_file(Path(out), media)


def test_a_video_goes_in_by_its_own_option(tmp_path: Path) -> None:
    film = tmp_path / "waves.mp4"
    film.write_bytes(b"frames")
    assert read_files({"seed": 0, "video": film}, "video") == {"seed": 0, "input_reference": b"frames"}
    with pytest.raises(ConfigError, match="--video and --image"):
        read_files({"image": [film], "video": film}, "video")


def test_a_video_begins_with_the_one_picture_that_goes_in_and_a_picture_may_be_made_of_several(
    tmp_path: Path,
) -> None:
    first = tmp_path / "first.png"
    first.write_bytes(b"pixels")
    assert read_files({"image": [first]}, "video") == {"input_reference": b"pixels"}
    assert read_files({"image": [first, first]}, "image") == {"image": [b"pixels", b"pixels"]}


def test_a_files_ending_chooses_the_format() -> None:
    assert choose_file(Path("a.JPG"), "image") == (Path("a.JPG"), {"output_format": "jpeg"})
    assert choose_file(Path("a.mp4"), "video") == (Path("a.mp4"), {})


def test_a_file_without_a_name_ends_as_what_the_model_makes() -> None:
    assert choose_file(None, "image") == (Path("out.png"), {"output_format": "png"})
    assert choose_file(None, "video") == (Path("out.mp4"), {})


def test_a_checkpoint_that_is_not_there_is_told_in_one_line(refused: Callable[..., str], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(Path(QUICKSTART).read_text().replace("embedded://shapes", "./no-such-model"))
    told = refused("generate", "a fox", "--config", str(config))
    assert told.startswith("relay: model.checkpoint: checkpoint './no-such-model' looks like a path")
    assert "Traceback" not in told


def test_generate_refuses_a_wrong_value_before_it_starts_anything(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    options = ["--config", QUICKSTART, "--steps", "999", "--out", str(tmp_path / "fox.png")]
    told = refused("generate", "a fox", *options)
    assert told == "relay: num_inference_steps must be between 1 and 150, got 999"


def test_generate_names_a_wrong_key_of_the_config(refused: Callable[..., str], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(Path(QUICKSTART).read_text().replace("transformer:", "transformr:"))
    told = refused("generate", "a fox", "--config", str(config))
    assert "unknown key 'transformr' (did you mean 'transformer'?)" in told

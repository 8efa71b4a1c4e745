"""Tests of `relay plan` and `relay profile`, run in this process."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from deployments.plan.profile import read_profile
from serve_app.cli import cli
from serve_app.config.app import ConfigError
from serve_app.config.check import check_requests
from serve_app.config.checkpoint_files import resolve_family
from serve_app.config.serve_file import load_app_config
from tests.thorough import usually

pytestmark = pytest.mark.slow

CONFIG = """
applications:
  - name: relay
    import_path: serve_app.app:build_app
    args:
      model:
        name: tiny
        checkpoint: tiny://flux
        defaults: {width: 128, height: 128, num_inference_steps: 8, true_cfg_scale: 2, negative_prompt: ""}
      encoder: {max_sequence_length: 128}
      transformer: {num_gpus: %s}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config whose transformer runs on the CPU."""
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG % 0)
    return path


def relay(*args: object) -> str:
    result = CliRunner().invoke(cli, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code in {0, 1}, result.output
    return result.output


def test_a_config_is_planned_without_gpus(config: Path) -> None:
    output = relay("plan", config)
    assert [line for line in output.splitlines() if "denoise 0 rank 0" in line and "CPU" in line]
    assert "128x128" in output


def test_a_proposed_config_is_served_as_it_was_planned(tmp_path: Path) -> None:
    files = {"--out": tmp_path / "x.yaml", "--json": tmp_path / "x.json", "--svg": tmp_path / "x.svg"}
    output = relay(
        "plan", "--model", "tiny://flux", "--gpus", "1x4GiB", *(a for file in files.items() for a in file)
    )
    assert "it fits" in output
    config = load_app_config(files["--out"])
    planned = json.loads(files["--json"].read_text())
    assert planned["fits"]
    assert [process["num_gpus"] for process in planned["processes"]] == [
        stage.num_gpus for stage in config.served[0].stages.values()
    ]
    ElementTree.parse(files["--svg"])
    again = relay("plan", files["--out"], "--gpus", "1x4GiB")
    assert "it fits" in again


@pytest.mark.parametrize(
    ("model", "size"), usually([("flux", "128x64"), ("kandinsky5", "1280x768")], lambda of: of[0] == "flux")
)
def test_a_proposed_config_draws_what_was_planned_for_and_can_be_served(
    tmp_path: Path, model: str, size: str
) -> None:
    """The limits admit the planned size only, whatever the checkpoint's default. FAMILIES lacks Kandinsky 5."""
    out = tmp_path / "x.yaml"
    relay("plan", "--model", f"tiny://{model}", "--gpus", "1x4GiB", "--size", size, "--out", out)
    config = resolve_family(load_app_config(out))
    check_requests(config)
    assert str(config.served[0].model.default_size) == size


@pytest.mark.parametrize(("gpus", "fewest"), [("1x4GiB", 1), ("1x3GiB", 0)])
def test_of_several_models_what_is_the_same_is_shared_and_they_sleep_where_there_is_no_room_for_all(
    tmp_path: Path, gpus: str, fewest: int
) -> None:
    out = tmp_path / "x.yaml"
    models = ("--model", "tiny://flux", "--model", "tiny://flux-kontext")
    assert relay("plan", *models, "--gpus", gpus, "--out", out).count("it fits") == len(models) // 2
    flux, kontext = load_app_config(out).served
    assert kontext.owners == {"encoder": "flux", "transformer": "flux-kontext", "vae": "flux"}
    assert (flux.encoder.min_replicas, flux.vae.min_replicas) == (1, 1)
    assert (flux.transformer.min_replicas, kontext.transformer.min_replicas) == (fewest, fewest)
    assert relay("plan", out, "--gpus", gpus).count("it fits") == len(models) // 2


def write_config(path: Path, model: str) -> Path:
    """Writes CONFIG for this tiny model, without `defaults` and `encoder`."""
    said = (CONFIG % 0).replace("tiny://flux", f"tiny://{model}").splitlines()
    path.write_text("\n".join(line for line in said if "defaults" not in line and "encoder" not in line))
    return path


def test_a_model_that_has_sizes_of_its_own_is_planned_for_the_largest(tmp_path: Path) -> None:
    assert "pixels are admitted" not in relay("plan", write_config(tmp_path / "x.yaml", "kandinsky5"))


@pytest.mark.thorough
def test_a_text_encoder_that_takes_any_length_is_planned_though_nobody_says_one(tmp_path: Path) -> None:
    assert "512x512x16" in relay("plan", write_config(tmp_path / "x.yaml", "latte"))


@pytest.mark.thorough
def test_an_encoder_of_pictures_is_planned(tmp_path: Path) -> None:
    assert "image_encoder" in relay("plan", write_config(tmp_path / "x.yaml", "wan21-i2v"), "--size", "64x64x5")


def test_a_plan_that_does_not_fit_says_by_how_much_and_fails(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG % 0.5)
    result = CliRunner().invoke(cli, ["plan", str(config), "--gpus", "1x1GiB"])
    assert result.exit_code == 1
    assert "does not fit: denoise 0 rank 0 needs 0.77 GiB" in " ".join(result.output.split())


def test_a_profile_is_measured_and_planned_with(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    output = relay("profile", config, "--out", out, "--size", "64x64", "--steps", 2)
    assert "64x64: encode" in output
    times = read_profile(out).times["64x64"]
    [denoiser] = times.denoisers.values()
    assert len(denoiser.blocks_s) == 8
    assert denoiser.num_forwards == 2 * 8  # 2 for guidance; the config's 8 steps, though only 2 were measured
    assert min(times.encode_s, times.decode_s, *denoiser.blocks_s) > 0
    planned = tmp_path / "plan.json"
    relay("plan", config, "--size", "64x64", "--profile", out, "--json", planned)
    found = json.loads(planned.read_text())
    assert found["bound_per_s"] == pytest.approx(1 / max(found["stage_s"].values()))
    assert found["stage_s"]["denoise"] == pytest.approx(times.rank_s([(0, 8)]))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "nothing to plan: name a config, or a checkpoint with --model"),
        (["--model", "tiny://flux"], "--model needs --gpus"),
        (["--model", "tiny://flux", "--gpus", "two"], "written as 2x16GiB"),
        (["CONFIG", "--model", "tiny://flux"], "leave out --model"),
        (["CONFIG", "--size", "big"], "write 1024x1024"),
        (["CONFIG", "--size", "65x64"], "multiples of 16"),
        (["--model", "tiny://kandinsky5", "--gpus", "1x4GiB", "--size", "1280x1280"], "draws 640x1408"),
        (["--model", "tiny://flux", "--gpus", "1x0.5GiB"], "it does not fit"),
    ],
)
def test_mistakes_are_told(config: Path, args: list[str], message: str) -> None:
    args = [str(config) if argument == "CONFIG" else argument for argument in args]
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(cli, ["plan", *args], catch_exceptions=False)

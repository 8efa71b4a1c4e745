"""The sizes that a checkpoint makes, read from its configs alone, equal those that its own pipeline computes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from deployments.checkpoints.components import ModelIndex, check_served, read_index
from deployments.checkpoints.geometry import read_geometry, with_geometry
from deployments.checkpoints.source import FAMILY_BY_PIPELINE
from deployments.config.model import DefaultsConfig, ModelConfig
from deployments.config.stage import StageConfig
from deployments.families import FAMILIES
from deployments.request import MediaSize
from deployments.stages.pipeline import load_pipeline
from tests.deployments.variants import edit, read_model, write_tiny

PUBLISHED = Path(__file__).parents[2] / "data" / "published"
TWO, FIVE = [8] * 2, [8] * 5
NO_CHANGE: Mapping[str, Any] = {}

Changes = Mapping[str, Mapping[str, Any]]
"""By component, the values that replace those of its config."""


def change(folder: Path, changes: Changes) -> None:
    for name, config in changes.items():
        edit(folder / name / "config.json", **config)


WITH_ENTRY = ("flux_dev", "flux_schnell", "qwen_image", "sd15", "sd3_medium", "sd35_large", "sdxl")
WAN = ("wan_2_1_1_3b", "wan_2_1_14b", "wan_2_2_a14b")


@pytest.mark.parametrize("name", [*WITH_ENTRY, *WAN])
def test_what_is_assumed_of_a_published_model_is_what_its_configs_say(name: str) -> None:
    """Tests models with an entry in the families; the sizes of the others are derived anyway."""
    folder = PUBLISHED / name
    family = FAMILIES[FAMILY_BY_PIPELINE[read_index(folder)["_class_name"]]]
    assert read_geometry(folder, family) == family.geometry(family.published)


@pytest.mark.parametrize(
    ("family", "changes", "default", "multiple"),
    [
        ("flux", {}, (1024, 1024), 16),
        ("flux", {"vae": {"block_out_channels": TWO}}, (256, 256), 4),
        ("flux", {"vae": {"block_out_channels": FIVE}}, (2048, 2048), 32),
        ("sd15", {"unet": {"sample_size": 96}}, (768, 768), 8),
        ("sd15", {"unet": {"sample_size": [8, 12]}}, (96, 64), 8),
        ("sd15", {"unet": {"sample_size": 96}, "vae": {"block_out_channels": TWO}}, (192, 192), 8),
        ("sd15", {"vae": {"block_out_channels": FIVE}}, (128, 128), 16),
        ("sd15", {"unet": {"sample_size": 32, "_diffusers_version": "0.6.0"}}, (512, 512), 8),
        ("sd15", {"unet": {"sample_size": 96, "_diffusers_version": "0.6.0"}}, (768, 768), 8),
        ("sdxl", {"unet": {"sample_size": 64}}, (512, 512), 8),
        ("sdxl", {"unet": {"sample_size": 64}, "vae": {"block_out_channels": FIVE}}, (1024, 1024), 16),
        ("sd3", {"transformer": {"sample_size": 64}}, (512, 512), 16),
        ("sd3", {"transformer": {"patch_size": 1}}, (64, 64), 8),
        ("sd3", {"vae": {"block_out_channels": TWO}}, (16, 16), 4),
        ("qwen-image", {"vae": {"temperal_downsample": [False, True]}}, (512, 512), 8),
        ("wan", {"vae": {"scale_factor_spatial": 16}}, (832, 480), 32),
        ("wan", {"vae": {"scale_factor_spatial": 4}}, (832, 480), 16),
        ("wan", {"transformer": {"patch_size": [1, 4, 4]}}, (832, 480), 32),
    ],
)
def test_sizes_are_those_of_the_checkpoint(
    tmp_path: Path, family: str, changes: Changes, default: tuple[int, int], multiple: int
) -> None:
    folder = write_tiny(family, tmp_path / family)
    change(folder, changes)
    geometry = read_model(folder).geometry
    assert (geometry.width, geometry.height) == default
    assert geometry.size_multiple == multiple


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, NO_CHANGE) for family in FAMILIES),
        *((family, {"vae": {"block_out_channels": FIVE}}) for family in ("flux", "sd15", "sdxl", "sd3")),
        ("qwen-image", {"vae": {"temperal_downsample": [True] * 4, "dim_mult": [1] * 5}}),
        ("wan", {"vae": {"scale_factor_spatial": 16, "scale_factor_temporal": 2}}),
    ],
)
def test_the_denoise_stages_pipeline_computes_the_same_without_a_vaes_weights(
    tmp_path: Path, family: str, changes: Changes
) -> None:
    folder = write_tiny(family, tmp_path / family)
    if "block_out_channels" in changes.get("vae", {}):
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 5, "up_block_types": ["UpDecoderBlock2D"] * 5}
        changes = {"vae": {**changes["vae"], **blocks}}
    change(folder, changes)
    geometry = read_model(folder).geometry
    pipe = load_pipeline(folder, read_index(folder), frozenset({"scheduler"}), StageConfig(), variant=None)
    factor = getattr(pipe, "vae_scale_factor", None) or pipe.vae_scale_factor_spatial
    assert geometry.latent_pixels == factor
    assert geometry.frame_stride == getattr(pipe, "vae_scale_factor_temporal", 1)
    if hasattr(pipe, "default_sample_size"):
        assert geometry.width == pipe.default_sample_size * factor


@pytest.mark.parametrize(
    ("family", "class_name", "missing"),
    [("sdxl", "AutoencoderTiny", "block_out_channels"), ("flux", "AutoencoderTiny", "decoder_block_out_channels")],
)
def test_what_a_vaes_config_leaves_out_is_its_classs_default(
    tmp_path: Path, family: str, class_name: str, missing: str
) -> None:
    folder = write_tiny(family, tmp_path / family)
    config = {"_class_name": class_name, "latent_channels": 4, "decoder_block_out_channels": [64] * 4}
    config.pop(missing, None)
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    assert read_model(folder).geometry.latent_pixels == 8


def test_a_vae_of_unknown_blocks_is_refused_not_guessed(tmp_path: Path) -> None:
    folder = write_tiny("sd15", tmp_path / "x")
    (folder / "vae" / "config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    with pytest.raises(ValueError, match="the vae is a VQModel, whose config has no block_out_channels"):
        read_model(folder)


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("flux", {"vae": {"block_out_channels": 4}}, "has no len"),
        ("sd15", {"unet": {"sample_size": "8"}}, "not enough values"),
        ("sd15", {"unet": {"sample_size": 0}}, "width would be 0"),
        ("sd15", {"unet": {"sample_size": [-8, 8]}}, "height would be -64"),
        ("sd15", {"vae": {"latent_channels": None}}, "latent_channels would be None"),
        ("wan", {"vae": {"scale_factor_spatial": None}}, "unsupported operand"),
        ("wan", {"vae": {"scale_factor_temporal": None}}, "frame_stride would be None"),
        ("wan", {"transformer": {"patch_size": 2}}, "cannot unpack"),
    ],
)
def test_a_config_that_tells_no_size_is_named(tmp_path: Path, family: str, changes: Changes, told: str) -> None:
    folder = write_tiny(family, tmp_path / family)
    change(folder, changes)
    with pytest.raises(ValueError, match=rf"the sizes cannot be read from .*/vae/config.json: .*{told}"):
        read_model(folder)


@pytest.mark.parametrize("text", ["[]", "null", ""])
@pytest.mark.parametrize("file", ["model_index.json", "vae/config.json"])
def test_a_file_without_settings_is_named(tmp_path: Path, file: str, text: str) -> None:
    folder = write_tiny("flux", tmp_path / "x")
    (folder / file).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=f"/{file} (does not hold a JSON object|is empty)"):
        read_model(folder, "flux")


def test_what_the_config_says_goes_before_the_checkpoint(tmp_path: Path) -> None:
    folder = write_tiny("sd15", tmp_path / "x")
    assert read_model(folder).default_size == MediaSize(64, 64)
    assert read_model(folder, defaults=DefaultsConfig(height=128)).default_size == MediaSize(64, 128)


def test_a_checkpoint_that_says_no_size_must_be_told_one(tmp_path: Path) -> None:
    folder = write_tiny("sdxl", tmp_path / "x")
    edit(folder / "unet" / "config.json", sample_size=None)
    with pytest.raises(
        ValueError, match=r"width and height must be set, because the transformer or unet .* no sample_size"
    ):
        assert read_model(folder).default_size
    told = DefaultsConfig(width=64, height=32)
    assert read_model(folder, defaults=told).default_size == MediaSize(64, 32)


def test_sd3_has_positions_for_so_many_pixels(tmp_path: Path) -> None:
    assert read_model(write_tiny("sd3", tmp_path / "x")).geometry.max_side == 32 * 16


def test_where_the_checkpoint_is_out_of_reach_a_familys_published_sizes_are_assumed() -> None:
    model = with_geometry(ModelConfig(name="m", checkpoint="nobody/has-this", family="sdxl"))
    assert model.default_size == MediaSize(1024, 1024)


def test_a_checkpoint_that_is_here_must_have_its_configs(tmp_path: Path) -> None:
    folder = write_tiny("sdxl", tmp_path / "x")
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks vae/config\.json, which gives the sizes"):
        read_model(folder, family="sdxl")


@pytest.mark.parametrize(
    ("family", "entries", "message"),
    [
        ("sd15", {"reward_model": ["transformers", "CLIPModel"]}, "no stage serves: reward_model"),
        ("sd15", {"vae": [None, None]}, "has no vae, which family sd15 needs"),
        ("wan", {"transformer": [None, None]}, r"has no denoiser \(transformer or unet\), which family wan"),
        ("flux", {"scheduler": [None, None], "vae": [None, None]}, "has no scheduler and no vae"),
    ],
)
def test_what_could_never_serve_is_refused_by_name(
    tmp_path: Path, family: str, entries: ModelIndex, message: str
) -> None:
    folder = write_tiny(family, tmp_path / family)
    for name in entries:
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").touch()
    edit(folder / "model_index.json", **entries)
    with pytest.raises(ValueError, match=message):
        read_model(folder)


@pytest.mark.parametrize("name", ["safety_checker", "image_encoder", "feature_extractor"])
def test_what_a_prompt_does_not_need_may_lie_there(tmp_path: Path, name: str) -> None:
    folder = write_tiny("sd15", tmp_path / "x")
    (folder / name).mkdir()
    (folder / name / "config.json").write_text("{}")
    index = {**read_index(folder), name: ["transformers", "Some"], "layers": [1, 2], "boundary": [0.5, 0.7]}
    check_served(folder, index, FAMILIES["sd15"])

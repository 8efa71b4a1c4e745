"""Weight files beside a layout: which components they hold, what they become, and what is refused."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deployments.checkpoints.components import read_index
from deployments.checkpoints.convert import convert
from deployments.checkpoints.integrity import find_stage_faults
from deployments.checkpoints.parts import find_parts, open_checkpoint
from deployments.checkpoints.source import fetch_checkpoint, with_family
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.engine.load import load_rank, open_denoisers
from tests.deployments.single_files import read, wan_tensors, write_gguf, write_sd15

DENOISE = ["scheduler", "unet"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = Path(shutil.copytree(fetch_checkpoint("tiny://sd15", ()), tmp_path / "sd15"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return copy


def read_model(checkpoint: Path, **settings: Any) -> ModelConfig:
    return with_family(ModelConfig(name="tiny", checkpoint=str(checkpoint), **settings))


def write_names(path: Path, *names: str) -> Path:
    text = json.dumps({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    return path


def fault(model: ModelConfig, config: Any = None) -> str:
    [told] = find_stage_faults(model, "denoise", config or TransformerConfig())
    return told


@pytest.mark.parametrize(
    ("names", "components"),
    [
        (["model.diffusion_model.x"], {"unet"}),
        (["model.diffusion_model.x", "first_stage_model.x"], {"unet", "vae"}),
        (["x", "cond_stage_model.transformer.x"], {"unet", "text_encoder"}),
    ],
)
def test_what_a_file_holds_is_told_by_its_names(folder: Path, names: list[str], components: set[str]) -> None:
    file = write_names(folder.parent / "whole.safetensors", *names)
    assert find_parts(read_model(file, config=str(folder)), read_index(folder)).keys() == components


@pytest.mark.parametrize(
    ("names", "components"),
    [
        (["text_encoders.t5xxl.x", "text_encoders.clip_l.x", "vae.x"], {"text_encoder", "text_encoder_3", "vae"}),
        (["text_encoders.clip_g.x"], {"text_encoder_2"}),
    ],
)
def test_so_it_is_with_the_encoders_of_sd3(folder: Path, names: list[str], components: set[str]) -> None:
    layout = fetch_checkpoint("tiny://sd3", ())
    file = write_names(folder.parent / "whole.safetensors", *names)
    parts = find_parts(read_model(file, config=str(layout)), read_index(layout))
    assert parts.keys() == {"transformer", *components}


def test_a_file_is_converted_once_and_anew_when_it_has_changed(folder: Path) -> None:
    file = write_sd15(folder, folder.parent / "sd15.safetensors")
    model, index = read_model(file, config=str(folder)), read_index(folder)
    made = open_checkpoint(model, index, DENOISE, "float16")
    weights = made / "unet" / "diffusion_pytorch_model.safetensors"
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float16}
    assert (made / "scheduler").resolve() == folder / "scheduler"
    when = weights.stat().st_mtime_ns
    assert open_checkpoint(model, index, DENOISE, "float16") == made
    assert weights.stat().st_mtime_ns == when
    shutil.copy(file, folder.parent / "other.safetensors")
    save_file({**load_file(file), "more": torch.zeros(1)}, file)
    assert open_checkpoint(model, index, DENOISE, "float16") != made


@pytest.mark.thorough
def test_a_converted_denoiser_has_no_variant_and_is_loaded_all_the_same(folder: Path) -> None:
    file = write_sd15(folder, folder.parent / "sd15.safetensors")
    model = read_model(folder, components={"unet": str(file)}, variant="fp16")
    config = TransformerConfig()
    assert load_rank(open_denoisers(model, config), model, config, 0).shards["unet"].blocks is None


def test_what_no_file_has_comes_from_the_layout(folder: Path) -> None:
    file = write_names(folder.parent / "x.safetensors", "model.diffusion_model.x")
    model = read_model(file, config=str(folder))
    assert open_checkpoint(model, read_index(folder), ["vae"], "float32") == folder


def test_a_look_at_a_file_converts_nothing(folder: Path) -> None:
    file = write_sd15(folder, folder.parent / "sd15.safetensors")
    shutil.rmtree(folder.parent / ".cache", ignore_errors=True)
    assert list(find_stage_faults(read_model(file, config=str(folder)), "denoise", TransformerConfig())) == []
    assert not (folder.parent / ".cache").exists()


def test_a_file_of_another_model_is_refused_in_one_sentence(folder: Path) -> None:
    file = folder.parent / "x.safetensors"
    save_file({"model.diffusion_model.x": torch.zeros(1)}, file)
    model = read_model(file, config=str(folder))
    with pytest.raises(
        ValueError, match=r"x\.safetensors: its unet cannot be converted with the configs of"
    ) as told:
        open_checkpoint(model, read_index(folder), DENOISE, "float32")
    assert "\n" not in str(told.value)


def test_a_text_encoder_alone_keeps_its_own_names(folder: Path) -> None:
    file, plain = folder.parent / "clip_l.safetensors", read(folder / "text_encoder")
    save_file(plain, file)
    (folder / "text_encoder" / "model.safetensors").unlink()
    convert(file, folder, "text_encoder", folder.parent / "made", torch.float32)
    made = read(folder.parent / "made")
    assert made.keys() == plain.keys()
    assert all(torch.equal(made[name], plain[name]) for name in plain)


def test_weights_that_nothing_reads_are_refused(folder: Path) -> None:
    layout, file = fetch_checkpoint("tiny://wan", ()), folder.parent / "x.safetensors"
    save_file({**wan_tensors(layout), "scaled_fp8": torch.zeros(2)}, file)
    with pytest.raises(
        ValueError, match=r"has weights that nothing reads, scaled_fp8 \(1 in all\): it belongs to another"
    ):
        convert(file, layout, "transformer", folder.parent / "made", torch.float32)


def test_gguf_of_another_model_is_refused(folder: Path) -> None:
    layout = fetch_checkpoint("tiny://wan", ())
    file = write_gguf({**wan_tensors(layout), "more": torch.zeros(2)}, folder.parent / "x.gguf")
    model = read_model(layout, components={"transformer": str(file)})
    denoiser = open_denoisers(model, TransformerConfig())
    with pytest.raises(ValueError, match=r"x\.gguf has weights that nothing reads, more \(1 in all\)"):
        load_rank(denoiser, model, TransformerConfig(), 0)


def test_a_class_that_is_read_from_no_single_file_is_never_read_from_the_layout_instead(folder: Path) -> None:
    layout = fetch_checkpoint("tiny://qwen-image", ())
    file = folder.parent / "vae.safetensors"
    save_file(read(layout / "vae"), file)
    with pytest.raises(ValueError, match="diffusers cannot read AutoencoderKLQwenImage from a single file"):
        convert(file, layout, "vae", folder.parent / "made", torch.float32)


@pytest.mark.parametrize(
    ("checkpoint", "sentence"),
    [
        ("sd15", "model.config is for a checkpoint in one file, and .*sd15 is a folder"),
        ("none.safetensors", r"one file, and .*none\.safetensors does not exist on node"),
        ("model.ckpt", r"model\.ckpt is pickled"),
        ("lora.safetensors", "is a LoRA"),
        ("cut.safetensors", "is not a safetensors file, or is cut short"),
        ("cut.gguf", "is not a GGUF file, or is cut short"),
    ],
)
def test_what_is_no_whole_model_in_a_file_is_refused(folder: Path, checkpoint: str, sentence: str) -> None:
    (folder.parent / "model.ckpt").touch()
    write_names(folder.parent / "lora.safetensors", "x.lora_A.weight")
    for name in ("cut.safetensors", "cut.gguf"):
        (folder.parent / name).write_bytes(b"\0" * 20)
    model = read_model(folder.parent / checkpoint, config=str(folder))
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        list(find_stage_faults(model, "denoise", TransformerConfig()))


@pytest.mark.parametrize("name", ["transformer", "scheduler", "tokenizer"])
def test_a_file_for_no_model_of_the_checkpoint_is_refused(folder: Path, name: str) -> None:
    model = read_model(folder, components={name: "x.safetensors"})
    with pytest.raises(ValueError, match=f"has no model '{name}'; it has text_encoder, unet, vae"):
        find_parts(model, read_index(folder))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"quantization": "nf4"},
            "is quantised (GGUF), which does not combine with quantization: leave out quantization",
        ),
        (
            {"device_map": "auto", "num_gpus": 2},
            "(GGUF), which does not combine with device_map: leave out device_map",
        ),
        (
            {"layerwise_casting": "float8_e4m3fn"},
            "is stored quantised, and quantization and layerwise_casting do not",
        ),
        ({"vram_limit_gib": 1}, "is stored quantised, and quantization and vram_limit_gib do not combine"),
    ],
)
def test_what_does_not_go_with_gguf_is_told(folder: Path, settings: dict[str, Any], sentence: str) -> None:
    file = write_gguf({"x": torch.zeros(2, 32)}, folder.parent / "x.gguf")
    model = read_model(folder, components={"unet": str(file)})
    assert sentence in fault(model, TransformerConfig(**settings))


def test_gguf_is_for_denoisers_alone(folder: Path) -> None:
    file = write_gguf({"x": torch.zeros(2, 32)}, folder.parent / "x.gguf")
    [told] = find_stage_faults(read_model(folder, components={"vae": str(file)}), "decode", VaeConfig())
    assert "GGUF files are only read for denoisers, and vae has class AutoencoderKL" in told

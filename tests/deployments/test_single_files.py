"""Models in one file draw what plain diffusers draws by from_single_file, bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import GGUFQuantizationConfig, StableDiffusionPipeline, WanPipeline, WanTransformer3DModel
from safetensors.torch import save_file

from deployments.config.encoder import EncoderConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.engine.load import load_rank, open_denoisers
from deployments.plan.describe import Description
from deployments.request import MediaSize
from tests.deployments.single_files import wan_tensors, write_gguf, write_sd15
from tests.deployments.variants import build_request, draw_plain, draw_staged, read_model, write_tiny

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moves the cache of converted models, under the user's home, to a temporary folder."""
    write_tiny("sd15", tmp_path / "sd15"), write_tiny("wan", tmp_path / "wan")
    monkeypatch.setenv("HOME", str(tmp_path))


def strip_weights(folder: Path, *components: str) -> None:
    for component in components:
        for file in (folder / component).glob("*.safetensors"):
            file.unlink()


def test_a_whole_model_in_one_file(tmp_path: Path) -> None:
    folder = tmp_path / "sd15"
    file = write_sd15(folder, tmp_path / "sd15.safetensors")
    strip_weights(folder, "unet", "vae", "text_encoder")
    model = read_model(file, config=str(folder))
    request = build_request(model)
    pipe = StableDiffusionPipeline.from_single_file(file, config=str(folder), local_files_only=True)
    np.testing.assert_array_equal(draw_staged(model, request), draw_plain(pipe, request))


@pytest.mark.thorough
def test_a_denoiser_in_one_file_beside_a_folder(tmp_path: Path) -> None:
    folder, file = tmp_path / "wan", tmp_path / "wan.safetensors"
    save_file(wan_tensors(folder), file)
    strip_weights(folder, "transformer")
    model = read_model(folder, components={"transformer": str(file)})
    request = build_request(model)
    transformer = WanTransformer3DModel.from_single_file(file, config=str(folder), subfolder="transformer")
    pipe = WanPipeline.from_pretrained(folder, transformer=transformer)
    np.testing.assert_array_equal(draw_staged(model, request), draw_plain(pipe, request))


def test_a_denoiser_in_gguf_beside_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "wan"
    file = write_gguf(wan_tensors(folder), tmp_path / "wan-Q8_0.gguf")
    strip_weights(folder, "transformer")
    model = read_model(folder, components={"transformer": str(file)})
    request = build_request(model)
    pipe = WanPipeline.from_pretrained(folder, transformer=load_gguf(file, folder))
    np.testing.assert_array_equal(draw_staged(model, request), draw_plain(pipe, request))


def test_ranks_read_their_blocks_of_a_gguf_file_and_weigh_what_was_planned(tmp_path: Path) -> None:
    folder = tmp_path / "wan"
    file = write_gguf(wan_tensors(folder), tmp_path / "wan-Q8_0.gguf")
    model = read_model(folder, components={"transformer": str(file)})
    config = TransformerConfig(shards=2)
    denoisers = open_denoisers(model, config)
    ranks = [load_rank(denoisers, model, config, rank) for rank in range(2)]
    torch.manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 16, 2, 8, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 7, 64),
    }
    boundary = ranks[0].run("transformer", inputs)
    assert isinstance(boundary, dict)
    [drawn] = ranks[1].run("transformer", inputs, boundary)
    with torch.no_grad():
        [expected] = load_gguf(file, folder)(**inputs, return_dict=False)
    assert torch.equal(drawn, expected)
    sizes = (MediaSize(64, 64, 5),)
    planned = Description(model).sizes(EncoderConfig(max_sequence_length=64), config, VaeConfig(), sizes)
    held = [sum(rank.residency.stats().weights_bytes.values()) for rank in ranks]
    assert [rank.weights_bytes for rank in planned.denoise.ranks] == held
    assert sum(held) < file.stat().st_size * 1.5
    offloaded = TransformerConfig(shards=2, offload={"kind": "model"})
    assert (
        Description(model)
        .sizes(EncoderConfig(max_sequence_length=64), offloaded, VaeConfig(), sizes)
        .denoise.ranks
    )


def load_gguf(file: Path, folder: Path) -> Any:
    return WanTransformer3DModel.from_single_file(
        file,
        config=str(folder),
        subfolder="transformer",
        dtype=torch.float32,
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
    )

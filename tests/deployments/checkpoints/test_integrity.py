"""Faults of a checkpoint's files that would keep a stage from loading: found in headers, before any import."""

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from deployments.checkpoints.components import Stage
from deployments.checkpoints.integrity import BrokenCheckpoint, check_stage, find_offload_faults, find_stage_faults
from deployments.checkpoints.source import detect_family, fetch_checkpoint
from deployments.checkpoints.weights import read_header
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.stage import StageConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig

STAGES: dict[Stage, StageConfig] = {
    "encode": EncoderConfig(),
    "denoise": TransformerConfig(),
    "decode": VaeConfig(),
}
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 492265168\n"
DENOISER = "transformer/diffusion_pytorch_model.safetensors"
ENCODER = "text_encoder/model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded checkpoint, for tests to damage."""
    return Path(shutil.copytree(fetch_checkpoint("embedded://shapes", ()), tmp_path / "shapes"))


def model(folder: Path, variant: str | None = None) -> ModelConfig:
    return ModelConfig(name="m", checkpoint=str(folder), family="flux", variant=variant)


def faults(folder: Path, variant: str | None = None, **transformer: Any) -> list[str]:
    """Returns the faults of all stages, each once."""
    stages = STAGES | {"denoise": TransformerConfig(**transformer)}
    found = [
        fault
        for stage, config in stages.items()
        for fault in find_stage_faults(model(folder, variant), stage, config)
    ]
    return list(dict.fromkeys(found))


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_header(path: Path, **changes: Any) -> None:
    """Changes the header of its first tensor."""
    header, tensors = read_header(path), path.read_bytes()
    header = {**header, min(header): header[min(header)] | changes}
    text = json.dumps(header).encode()
    start = 8 + struct.unpack("<Q", tensors[:8])[0]
    path.write_bytes(struct.pack("<Q", len(text)) + text + tensors[start:])


def write_safetensors(path: Path, *names: str) -> None:
    """Writes a file with one number for each tensor."""
    header = {n: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, n in enumerate(names)}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4 * len(names)))


def write_parts(folder: Path, ending: str = "safetensors") -> Path:
    """Splits the denoiser into two parts of one tensor each; returns the index that names them."""
    transformer = folder / "transformer"
    (transformer / "diffusion_pytorch_model.safetensors").unlink()
    names = {"x.weight": f"one.{ending}", "y.weight": f"two.{ending}"}
    for tensor, part in names.items():
        write_safetensors(transformer / part, tensor)
    index = transformer / f"diffusion_pytorch_model.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return index


def rename_weights(folder: Path, infix: str, components: str = "*") -> None:
    for file in folder.glob(f"{components}/*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.{infix}.safetensors"))


def test_a_whole_checkpoint_has_no_fault(folder: Path) -> None:
    assert faults(folder) == []


def test_parts_that_are_whole_have_no_fault(folder: Path) -> None:
    write_parts(folder)
    assert faults(folder) == []


def to_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("../../blobs/4f3e")


BREAKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pointer": (lambda path: path.write_text(LFS_POINTER), r" is a Git LFS pointer, .* run `git lfs pull`"),
    "link": (to_dangling_link, r" is a link to \.\./\.\./blobs/4f3e, which does not exist"),
    "empty": (lambda path: cut(path, 0), " is empty: fetch it again"),
    "cut in its length": (lambda path: cut(path, 5), r" is not a safetensors file, or is cut short \(5 bytes\)"),
    "cut in its header": (
        lambda path: cut(path, 200),
        r" is not a safetensors file, or is cut short \(200 bytes\)",
    ),
    "cut in its tensors": (lambda path: cut(path, path.stat().st_size - 1), r" is cut short: it has [\d,]+ of"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"more"), " is longer than it should be"),
    "an error page": (lambda path: path.write_text("<html>404" * 999), " is not a safetensors file"),
    "a broken header": (
        lambda path: path.write_bytes(struct.pack("<Q", 9) + b'{"a": 1}}' + bytes(99)),
        " has a broken safetensors header",
    ),
    "a dtype that is none": (
        lambda path: rewrite_header(path, dtype="float32"),
        r" has a broken safetensors header \(.*unknown variant `float32`",
    ),
    "a shape of another length": (
        lambda path: rewrite_header(path, shape=[1, 2, 3]),
        r" has a broken safetensors header \(.*",
    ),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), " is a folder, and must be a file"),
}


@pytest.mark.parametrize("file", [ENCODER, DENOISER])
@pytest.mark.parametrize("how", BREAKS)
def test_weights_that_are_not_whole_are_named_with_what_is_wrong(folder: Path, file: str, how: str) -> None:
    break_it, sentence = BREAKS[how]
    break_it(folder / file)
    [fault] = faults(folder)
    assert re.fullmatch(f"{re.escape(str(folder / file))}{sentence}.*", fault)


@pytest.mark.parametrize(
    "file",
    [
        "text_encoder/config.json",
        "transformer/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
        "tokenizer_2/tokenizer_config.json",
    ],
)
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (LFS_POINTER, "is a Git LFS pointer"),
        ("", "is empty"),
        ('{"a": 1,\n "b" 2}', "is not JSON (line 2, column 6"),
        ('{"a": [1, 2', "is not JSON (line 1"),
    ],
    ids=["pointer", "empty", "typo", "cut short"],
)
def test_a_small_file_that_is_not_whole_is_named(folder: Path, file: str, text: str, sentence: str) -> None:
    (folder / file).write_text(text)
    [fault] = faults(folder)
    assert fault.startswith(f"{folder / file} {sentence}")


@pytest.mark.parametrize("text", [LFS_POINTER, "", '{"_class_name": '], ids=["pointer", "empty", "cut short"])
def test_an_index_of_the_model_that_is_not_whole_is_named(folder: Path, text: str) -> None:
    (folder / "model_index.json").write_text(text)
    with pytest.raises(FileNotFoundError, match=r"model_index\.json is (a Git LFS pointer|empty|not JSON)"):
        detect_family(str(folder), None)
    with pytest.raises(FileNotFoundError, match=r"model_index\.json is (a Git LFS pointer|empty|not JSON)"):
        faults(folder)


def test_a_config_that_is_a_list_is_named(folder: Path) -> None:
    (folder / "vae" / "config.json").write_text("[]")
    assert faults(folder) == [f"{folder}/vae/config.json does not hold a JSON object: fetch it again"]


@pytest.mark.parametrize("file", ["text_encoder/config.json", "transformer/config.json"])
def test_a_config_that_is_missing_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    assert faults(folder) == [f"{folder / file} is missing: fetch it"]


def test_a_part_that_is_missing_is_named(folder: Path) -> None:
    index = write_parts(folder)
    (index.parent / "two.safetensors").unlink()
    [fault] = faults(folder)
    assert fault == f"{index.parent / 'two.safetensors'} is missing, and {index.name} names it: fetch it"


def test_a_part_that_is_broken_is_named(folder: Path) -> None:
    index = write_parts(folder)
    (index.parent / "two.safetensors").write_text(LFS_POINTER)
    [fault] = faults(folder)
    assert fault.startswith(f"{index.parent / 'two.safetensors'} is a Git LFS pointer")


def test_a_part_of_another_checkpoint_is_named(folder: Path) -> None:
    index = write_parts(folder)
    write_safetensors(index.parent / "two.safetensors", "z.weight")
    [fault] = faults(folder)
    assert "two.safetensors lacks y.weight, which" in fault


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {}}',
        '{"weight_map": {"x": 5}}',
        '{"weight_map": {"x": null}}',
    ],
)
def test_an_index_without_a_map_is_refused(folder: Path, text: str) -> None:
    index = write_parts(folder)
    index.write_text(text)
    assert faults(folder) == [f"{index} has no weight_map, so it is not an index of weights: fetch it again"]


def test_an_index_without_metadata_is_refused(folder: Path) -> None:
    """transformers and diffusers need the metadata."""
    index = write_parts(folder)
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    assert faults(folder) == [f"{index} has no metadata and is not read without it: fetch it again"]


@pytest.mark.parametrize("stored", ["int8", [8]])
def test_a_quantisation_that_is_no_object_is_named(folder: Path, stored: Any) -> None:
    rewrite(folder / "transformer" / "config.json", quantization_config=stored)
    [fault] = faults(folder)
    assert fault.startswith(f"{folder / 'transformer' / 'config.json'}: quantization_config must be a JSON object")


def test_pickles_in_parts_come_with_the_command_that_converts_them(folder: Path) -> None:
    index = write_parts(folder, "bin")
    [fault] = faults(folder)
    assert fault.startswith(f"{index} is an index of pickled weights in parts")
    assert "diffusers.FluxTransformer2DModel.from_pretrained(" in fault
    assert "use_safetensors=False).save_pretrained(" in fault


def test_pickles_cannot_be_mapped(folder: Path) -> None:
    (folder / DENOISER).unlink()
    pickled = folder / "transformer" / "diffusion_pytorch_model.bin"
    pickled.write_bytes(b"\x80\x02}q\x00.")
    assert faults(folder) == []
    [fault] = faults(folder, vram_limit_gib=1, host_copy="files")
    assert fault.startswith(f"{pickled} is pickled, and host_copy: files needs safetensors")


def test_weights_of_another_dtype_cannot_be_mapped(folder: Path) -> None:
    write_safetensors(folder / DENOISER, "x.weight")
    assert faults(folder, vram_limit_gib=1, host_copy="files") == []
    [fault] = faults(folder, vram_limit_gib=1, host_copy="files", dtype="bfloat16")
    assert f"{folder / DENOISER} is stored as float32, but dtype is bfloat16, and host_copy: files needs" in fault


def test_a_pickle_that_is_cut_short_is_named(folder: Path) -> None:
    (folder / DENOISER).unlink()
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"PK\x03\x04" + bytes(99))
    [fault] = faults(folder)
    assert "diffusion_pytorch_model.bin is cut short (103 bytes)" in fault


@pytest.mark.parametrize(
    "name", ["x.lora_A.weight", "x.lora_B.default.weight", "x.base_layer.weight", "x.lora_down.weight"]
)
def test_lora_layers_that_were_not_fused_are_told(folder: Path, name: str) -> None:
    write_safetensors(folder / DENOISER, "x.weight", name)
    [fault] = faults(folder)
    assert fault.startswith(
        f"{folder / DENOISER} still has LoRA layers in it ({name}): call diffusers' fuse_lora()"
    )


def test_weights_of_a_variant_alone_say_what_to_set(folder: Path) -> None:
    rename_weights(folder, "fp16")
    found = faults(folder)
    assert len(found) == 4
    assert (
        f"{folder}/transformer has no plain weights, only those of the variant fp16: set `variant: fp16`"
        in found[2]
    )
    assert faults(folder, "fp16") == []


def test_where_only_the_denoiser_lacks_a_variant_it_is_named(folder: Path) -> None:
    rename_weights(folder, "fp16", "[!t]*")
    assert faults(folder, "fp16") == [
        f"{folder}/transformer has no weights of the variant 'fp16', only plain ones: leave out variant"
    ]


@pytest.mark.parametrize(
    ("present", "told"), [(None, "it has none: leave out variant"), ("bf16", "it has bf16: ")]
)
def test_a_variant_that_does_not_exist_is_refused_once(folder: Path, present: str | None, told: str) -> None:
    if present is not None:
        rename_weights(folder, present)
    [fault] = faults(folder, "fp16")
    assert f"{folder} has no weights of the variant 'fp16'; {told}" in fault


@pytest.mark.parametrize("component", ["text_encoder", "transformer", "vae"])
@pytest.mark.parametrize("method", ["gguf", "quanto", "svdquant", "nunchaku_lite", "fp8", "gptq", "modelopt"])
def test_a_quantisation_that_is_not_loaded_is_named(folder: Path, component: str, method: str) -> None:
    rewrite(folder / component / "config.json", quantization_config={"quant_method": method})
    [fault] = faults(folder)
    assert fault.startswith(f"{folder / component} is stored quantised by {method}, which is not supported")


@pytest.mark.parametrize(
    "stored", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {"load_in_8bit": True}, None]
)
def test_bitsandbytes_is_loaded(folder: Path, stored: Any) -> None:
    rewrite(folder / "transformer" / "config.json", quantization_config=stored)
    assert faults(folder) == []


@pytest.mark.parametrize("model_file", ["spiece.model", "tokenizer.model"])
def test_a_sentencepiece_model_alone_says_what_to_install(folder: Path, model_file: str) -> None:
    (folder / "tokenizer_2" / "tokenizer.json").unlink()
    (folder / "tokenizer_2" / model_file).write_bytes(b"model")
    [fault] = faults(folder)
    assert f"{folder}/tokenizer_2 has {model_file} but no tokenizer.json" in fault
    assert "`pip install sentencepiece`" in fault


def test_a_tokenizer_without_a_vocabulary_is_named(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    [fault] = faults(folder)
    assert fault.startswith(f"{folder}/tokenizer has no vocabulary (tokenizer.json, vocab.json")


def test_a_vocabulary_without_merges_is_named(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    [fault] = faults(folder)
    assert f"{folder}/tokenizer/merges.txt is missing" in fault


@pytest.mark.parametrize("component", ["text_encoder", "tokenizer", "transformer", "scheduler", "vae"])
def test_an_empty_component_is_named(folder: Path, component: str) -> None:
    shutil.rmtree(folder / component)
    (folder / component).mkdir()
    assert faults(folder) == [f"{folder / component} is empty: fetch the checkpoint again"]


@pytest.mark.parametrize("file", ["flux1-dev-Q4.gguf", "flux1-dev.safetensors"])
def test_weights_of_another_name_are_told(folder: Path, file: str) -> None:
    (folder / DENOISER).rename(folder / "transformer" / file)
    [fault] = faults(folder)
    assert f"{folder}/transformer has no weights (diffusion_pytorch_model.safetensors); it has {file}" in fault


def test_a_class_that_this_diffusers_lacks_is_named(folder: Path) -> None:
    rewrite(folder / "model_index.json", transformer=["diffusers", "Flux9Transformer2DModel"])
    [fault] = faults(folder)
    assert re.search(r"transformer: diffusers [\d.]+ has no class Flux9Transformer2DModel: install a newer", fault)


@pytest.mark.skipif(find_spec("torchsde") is not None, reason="torchsde is installed")
def test_a_class_whose_package_is_missing_says_what_to_install(folder: Path) -> None:
    rewrite(folder / "model_index.json", scheduler=["diffusers", "DPMSolverSDEScheduler"])
    [fault] = faults(folder)
    assert "diffusers' DPMSolverSDEScheduler needs torchsde, not installed here: `pip install torchsde`" in fault


@pytest.mark.skipif(find_spec("torchao") is not None, reason="torchao is installed")
def test_weights_of_torchao_say_what_to_install(folder: Path) -> None:
    rewrite(folder / "transformer" / "config.json", quantization_config={"quant_method": "torchao"})
    [fault] = faults(folder)
    assert "is stored quantised by torchao, which is not installed here: `pip install torchao`" in fault


def test_a_class_of_another_library_is_named(folder: Path) -> None:
    rewrite(folder / "model_index.json", vae=["my_code", "MyVae"])
    [fault] = faults(folder)
    assert "vae: its class MyVae is from my_code; only diffusers' and transformers' are loaded" in fault


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"shards": 40}, "transformer.shards: must be at most 6, because each needs a block, got 40"),
        ({"cuts": (3, 6)}, "transformer.cuts: must be below 6, the number of blocks, got 6"),
    ],
)
def test_more_shards_than_blocks_are_refused(folder: Path, settings: dict[str, Any], told: str) -> None:
    rewrite(folder / "transformer" / "config.json", num_layers=2, num_single_layers=4)
    assert faults(folder, **settings) == [told]
    assert faults(folder, shards=6) == []


def test_a_folder_to_offload_to_must_be_there_and_writable(tmp_path: Path) -> None:
    missing, file = tmp_path / "missing", tmp_path / "file"
    file.touch()
    for path, told in ((missing, "does not exist"), (file, "is not a folder")):
        config = TransformerConfig.model_validate({"offload": {"kind": "group", "folder": str(path)}})
        [fault] = find_offload_faults("denoise", config)
        assert fault.startswith(f"transformer.offload.folder: {path} {told}")
    config = TransformerConfig.model_validate({"offload": {"kind": "group", "folder": str(tmp_path)}})
    assert list(find_offload_faults("denoise", config)) == []


def test_each_stage_looks_at_its_own_files_only(folder: Path) -> None:
    (folder / DENOISER).write_text(LFS_POINTER)
    check_stage(model(folder), "encode", EncoderConfig())
    with pytest.raises(BrokenCheckpoint, match="Git LFS pointer"):
        check_stage(model(folder), "denoise", TransformerConfig())


def test_every_fault_gets_a_line(folder: Path) -> None:
    (folder / ENCODER).write_text(LFS_POINTER)
    (folder / "text_encoder_2" / "config.json").write_text("{")
    with pytest.raises(BrokenCheckpoint) as refused:
        check_stage(model(folder), "encode", EncoderConfig())
    assert len(str(refused.value).splitlines()) == 2


def test_files_are_looked_at_without_torch(folder: Path) -> None:
    """The check imports nothing heavy, so it is quick: it runs before each start."""
    code = (
        "import sys; from deployments.checkpoints.integrity import check_stage; "
        "from deployments.config.encoder import EncoderConfig; from deployments.config.model import ModelConfig; "
        f"model = ModelConfig(name='m', checkpoint={str(folder)!r}, family='flux'); "
        "check_stage(model, 'encode', EncoderConfig()); "
        "print({'torch', 'diffusers', 'transformers', 'ray'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"

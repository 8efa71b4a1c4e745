"""Layouts other than diffusers': served where their meaning is clear, otherwise described in the error."""

import codecs
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from deployments.checkpoints.source import detect_family, fetch_checkpoint, fetch_configs

COMMIT = "0123abcd" * 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(fetch_checkpoint("embedded://shapes", ()), tmp_path / "shapes"))


@pytest.fixture
def cache(folder: Path) -> Path:
    """Returns a repository of the hub's cache, with one snapshot."""
    repository = folder.parent / "models--org--name"
    (repository / "snapshots").mkdir(parents=True)
    folder.rename(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return repository


def write_safetensors(path: Path, *names: str) -> Path:
    text = json.dumps({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    return path


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_folder_of_the_hubs_cache_is_its_snapshot(cache: Path, revision: str | None) -> None:
    snapshot = cache / "snapshots" / COMMIT
    assert detect_family(str(cache), revision) == "flux"
    assert fetch_configs(str(cache), revision=revision) == snapshot
    assert fetch_checkpoint(str(cache), ["vae"], revision=revision) == snapshot


def test_the_only_snapshot_of_a_cache_without_refs_is_meant(cache: Path) -> None:
    shutil.rmtree(cache / "refs")
    assert fetch_checkpoint(str(cache), []) == cache / "snapshots" / COMMIT


def test_a_snapshot_that_the_cache_lacks_is_named(cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"without a snapshot of v2; it has {COMMIT}: set `revision`"):
        fetch_checkpoint(str(cache), [], revision="v2")


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json", "tokenizer/tokenizer.json"])
def test_byte_order_marks_are_left_out(folder: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    plain = (folder / file).read_bytes()
    (folder / file).write_bytes(codecs.BOM_UTF8 + plain)
    assert detect_family(str(folder), None) == "flux"
    served = fetch_checkpoint(str(folder), ["transformer"])
    assert (served / file).read_bytes() == plain
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (served / weights).resolve() == (folder / weights).resolve()
    assert fetch_checkpoint(str(folder), ["transformer"]) == served


def test_a_checkpoint_that_has_changed_is_copied_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    config = folder / "vae" / "config.json"
    config.write_bytes(codecs.BOM_UTF8 + b"{}")
    assert (fetch_checkpoint(str(folder), []) / "vae" / "config.json").read_text() == "{}"
    config.write_bytes(codecs.BOM_UTF8 + b'{"a": 1}')
    assert (fetch_checkpoint(str(folder), []) / "vae" / "config.json").read_text() == '{"a": 1}'


def single_file(*tensors: str) -> Callable[[Path], Path]:
    return lambda tmp_path: write_safetensors(tmp_path / "model.safetensors", *tensors)


def folder_with(*names: str) -> Callable[[Path], Path]:
    def make(tmp_path: Path) -> Path:
        made = tmp_path / "made"
        made.mkdir()
        for name in names:
            (made / name).parent.mkdir(exist_ok=True)
            (made / name).write_text("{}")
        return made

    return make


def gguf(tmp_path: Path) -> Path:
    file = tmp_path / "model-Q4.gguf"
    file.touch()
    return file


def pickled(tmp_path: Path) -> Path:
    file = tmp_path / "model.ckpt"
    file.touch()
    return file


def component(tmp_path: Path) -> Path:
    (tmp_path / "model_index.json").write_text("{}")
    return folder_with("config.json")(tmp_path)


LAYOUTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "FLUX in one file": (single_file("double_blocks.0.x"), r"such as `config: black-forest-labs/FLUX\.1-dev`"),
    "SD 1.5 in one file": (
        single_file("cond_stage_model.x"),
        r"config: stable-diffusion-v1-5/stable-diffusion-v1-5",
    ),
    "SDXL in one file": (
        single_file("conditioner.embedders.1.x"),
        r"config: stabilityai/stable-diffusion-xl-base",
    ),
    "SD 3 in one file": (single_file("model.joint_blocks.1.x"), r"config: stabilityai/stable-diffusion-3-medium"),
    "anything in one file": (single_file("x"), r"is a single file of weights.*components: {{transformer: {}}}"),
    "a pickle": (pickled, r"is pickled.*can run any program: convert it with .*torch\.load\('{}'"),
    "a LoRA in one file": (single_file("x.lora_A.weight"), r"is a LoRA, not a checkpoint\. Serve its base model"),
    "GGUF": (gguf, "is a single file of weights.*serve `checkpoint: OWNER/NAME` with `components:"),
    "the index itself": (lambda path: component(path).parent / "model_index.json", "name its folder"),
    "a component": (component, "is one component of a checkpoint: name the folder that it is in"),
    "a LoRA": (folder_with("pytorch_lora_weights.safetensors"), "is a LoRA, not a checkpoint"),
    "a LoRA of peft": (folder_with("adapter_config.json", "adapter_model.safetensors"), "is a LoRA"),
    "Wan's own": (folder_with("Wan2.1_VAE.pth", "config.json"), "is Wan's original layout.*ends in -Diffusers"),
    "BFL's own": (
        folder_with("flux1-dev.safetensors", "ae.safetensors"),
        "holds weight files.*Fetch the whole",
    ),
    "one model": (folder_with("config.json", "model.safetensors"), "holds one model, not a pipeline"),
    "a folder too high": (
        folder_with("flux/model_index.json"),
        "a folder in it has one: name that folder, .*made/flux",
    ),
    "no index": (folder_with("vae/config.json"), r"has components but no model_index\.json: fetch that file too"),
    "nothing": (folder_with(), "the folder is empty: fetch the checkpoint"),
    "something else": (folder_with("README.md"), r"has no model_index\.json; it must be a folder in diffusers'"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_layout_is_told_with_the_way_out(tmp_path: Path, layout: str) -> None:
    make, sentence = LAYOUTS[layout]
    path = make(tmp_path)
    with pytest.raises(FileNotFoundError, match=sentence.format(path)):
        fetch_checkpoint(str(path), [])

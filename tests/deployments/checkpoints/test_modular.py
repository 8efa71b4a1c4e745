"""Variants of modular_model_index.json: components in the same repository, in another one, and missing."""

import json
from pathlib import Path
from typing import Any

import pytest

from deployments.checkpoints.components import check_served, component_names, left_out, read_index
from deployments.checkpoints.modular import MODULAR_INDEX, is_modular, locations
from deployments.checkpoints.source import detect_family, fetch_checkpoint, local_folder
from deployments.families.flux import FLUX

REPOSITORY = "somebody/flux-3"


def entry(
    library: str, class_name: str, folder: str, *, repository: str | None = REPOSITORY, is_loaded: bool = True
) -> list[Any]:
    where = {"pretrained_model_name_or_path": repository, "subfolder": folder, "variant": None, "revision": None}
    names = [library, class_name]
    return [*(names if is_loaded else [None, None]), {"type_hint": names, **where}]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a repository, whose index names the original repository."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "flux-3"
    for name in ("transformer", "vae"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
    write_index(folder, transformer=entry("diffusers", "Flux3Transformer2DModel", "transformer"))
    return folder


def write_index(folder: Path, **entries: Any) -> None:
    names = {"_class_name": "Flux3ModularPipeline", "_blocks_class_name": "Flux3AutoBlocks"}
    entries.setdefault("vae", entry("diffusers", "AutoencoderKLFlux2", "vae", is_loaded=False))
    (folder / MODULAR_INDEX).write_text(json.dumps(names | entries))


def opened(folder: Path) -> Path:
    found = local_folder(str(folder))
    assert found is not None
    return found


def test_it_is_read_as_the_index_of_any_pipeline(folder: Path) -> None:
    """Where the index does not name a class, the class is that of the type hint."""
    index = read_index(opened(folder))
    assert is_modular(index)
    assert index["transformer"] == ["diffusers", "Flux3Transformer2DModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKLFlux2"]
    assert detect_family(str(folder), None) == "Flux3ModularPipeline"


def test_what_lies_in_the_folder_is_taken_from_there_whatever_the_index_says(folder: Path) -> None:
    fetched = fetch_checkpoint(str(folder), ["transformer", "vae"])
    assert (fetched / "vae").resolve() == folder / "vae"


@pytest.mark.parametrize("subfolder", ["", "vae"])
def test_a_component_in_another_folder_is_linked(folder: Path, tmp_path: Path, subfolder: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (folder / "vae").rename(other / "vae")
    path = str(other if subfolder else other / "vae")
    write_index(folder, vae=entry("diffusers", "AutoencoderKLFlux2", subfolder, repository=path))
    assert (fetch_checkpoint(str(folder), ["vae"]) / "vae").resolve() == other / "vae"


def test_a_component_that_is_not_on_this_machine_is_left_out_and_its_place_is_told(folder: Path) -> None:
    write_index(folder, text_encoder=entry("transformers", "Qwen3VLForConditionalGeneration", "te"))
    index = read_index(opened(folder))
    assert left_out(index) == {"text_encoder"}
    assert component_names(index) == {"vae"}
    assert locations(opened(folder))["text_encoder"] == f"{REPOSITORY}/te"


def test_a_model_that_rewrites_prompts_may_be_there(folder: Path) -> None:
    (folder / "prompt_upsampler").mkdir()
    (folder / "prompt_upsampler" / "config.json").write_text("{}")
    write_index(
        folder,
        transformer=entry("diffusers", "Flux3Transformer2DModel", "transformer"),
        prompt_upsampler=entry("transformers", "Qwen3_5ForConditionalGeneration", "prompt_upsampler"),
    )
    check_served(opened(folder), read_index(opened(folder)), FLUX)


def test_a_class_that_stands_for_another_is_the_one_that_the_files_name(folder: Path) -> None:
    (folder / "tokenizer").mkdir()
    settings = {"processor_class": "Qwen3VLProcessor"}
    (folder / "tokenizer" / "processor_config.json").write_text(json.dumps(settings))
    write_index(folder, tokenizer=entry("transformers", "AutoProcessor", "tokenizer"))
    assert read_index(opened(folder))["tokenizer"] == ["transformers", "Qwen3VLProcessor"]


def test_a_name_that_leads_elsewhere_is_none(folder: Path) -> None:
    write_index(folder, **{"../vae": entry("diffusers", "AutoencoderKLFlux2", "vae")})
    assert component_names(read_index(opened(folder))) == {"vae"}
    assert not (opened(folder).parent / "vae").exists()


def test_a_folder_with_the_index_of_a_classic_pipeline_too_is_that(folder: Path) -> None:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert opened(folder) == folder
    assert detect_family(str(folder), None) == "flux"


def test_blocks_that_are_code_of_the_checkpoint_are_refused(folder: Path) -> None:
    (folder / "modular_config.json").write_text(json.dumps({"auto_map": {"ModularPipelineBlocks": "b.Blocks"}}))
    with pytest.raises(
        ValueError, match=r"brings its own code for its blocks, and a checkpoint's code is never run"
    ):
        detect_family(str(folder), None)


def test_an_index_without_blocks_is_refused(folder: Path) -> None:
    (folder / MODULAR_INDEX).write_text("{}")
    with pytest.raises(ValueError, match=r"does not say which class its blocks have \(_blocks_class_name\)"):
        detect_family(str(folder), None)

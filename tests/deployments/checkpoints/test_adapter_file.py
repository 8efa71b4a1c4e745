"""Tests of which file of a folder is an adapter's, and of what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deployments.checkpoints.adapter_file import USUAL_NAME, fetch_adapter


def write(file: Path, *names: str) -> None:
    save_file({name: torch.zeros(2, 2) for name in names or ("layer.lora_A.weight",)}, file)


def test_the_usual_name_goes_before_others_and_one_alone_needs_no_name(tmp_path: Path) -> None:
    write(tmp_path / "style.safetensors")
    assert fetch_adapter(str(tmp_path)).name == "style.safetensors"
    write(tmp_path / USUAL_NAME)
    assert fetch_adapter(str(tmp_path)).name == USUAL_NAME
    assert fetch_adapter(str(tmp_path), weight_name="style.safetensors").name == "style.safetensors"
    assert fetch_adapter(str(tmp_path / "style.safetensors")).name == "style.safetensors"


def test_a_folder_without_weights_is_refused_as_that(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    with pytest.raises(FileNotFoundError, match=r"has no \.safetensors file"):
        fetch_adapter(str(tmp_path))


def test_several_files_need_weight_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"2 weight files \(a.safetensors, b.safetensors\): set weight_name"):
        fetch_adapter(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no c.safetensors; it has a.safetensors, b.safetensors"):
        fetch_adapter(str(tmp_path), weight_name="c.safetensors")


def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        fetch_adapter(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("layer.lokr_w1", "a LoKr"),
        ("layer.hada_w1_a", "a LoHa"),
        ("layer.dora_scale", "a DoRA"),
        ("layer.diff", "whole layers"),
        ("block.norm.weight", "whole layers, as in a ControlLoRA"),
    ],
)
def test_what_is_no_low_rank_term_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    write(tmp_path / "other.safetensors", "layer.lora_A.weight", name)
    with pytest.raises(ValueError, match=f"{name} is part of {kind}"):
        fetch_adapter(str(tmp_path))

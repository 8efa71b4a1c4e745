"""The packages that diffusers' classes need."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from deployments.checkpoints.derived import derive_family
from deployments.checkpoints.packages import describe_missing, import_class, is_public, library_of


@pytest.mark.parametrize("class_name", ["FluxPipeline", "WanTransformer3DModel", "KolorsPipeline"])
def test_public_classes_are_known_without_their_packages(class_name: str) -> None:
    assert is_public(class_name)


def test_a_class_that_one_pipeline_has_for_itself_is_diffusers_too() -> None:
    """model_index.json lists LTX-2's vocoder under a package `ltx2`."""
    assert library_of("ltx2") == "diffusers"
    assert is_public("LTX2Vocoder", "ltx2")
    assert not is_public("LTX9Vocoder", "ltx2")
    assert import_class(("ltx2", "LTX2Vocoder")).__module__ == "diffusers.pipelines.ltx2.vocoder"


@pytest.mark.parametrize("package", ["transformers", "os", "..", "ltx2.vocoder", "/etc"])
def test_no_other_package_is_taken_for_a_part_of_diffusers(package: str) -> None:
    assert library_of(package) == package


def test_a_class_that_needs_nothing_more_lacks_nothing() -> None:
    assert describe_missing("FluxPipeline") is None


@pytest.mark.parametrize(
    ("class_name", "module", "name"),
    [
        ("DPMSolverSDEScheduler", "torchsde", "torchsde"),
        ("LMSDiscreteScheduler", "scipy", "scipy"),
        ("KolorsPipeline", "sentencepiece", "sentencepiece"),
        ("ConsisIDPipeline", "cv2", "opencv-python"),
    ],
)
def test_what_is_missing_is_named_as_pip_knows_it(class_name: str, module: str, name: str) -> None:
    told = describe_missing(class_name)
    is_here = find_spec(module) is not None
    assert told is None if is_here else f"needs {name}, not installed here: `pip install {name}`" in str(told)


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="it is installed")
def test_a_pipeline_whose_package_is_missing_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="diffusers' KolorsPipeline needs sentencepiece, not installed here"):
        derive_family(tmp_path, "KolorsPipeline")

"""The sources of checkpoints; no test here uses the network."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from deployments.checkpoints.source import (
    FAMILY_BY_PIPELINE,
    detect_family,
    fetch_checkpoint,
    fetch_configs,
    plan_hub_patterns,
    with_family,
)
from deployments.config.model import ModelConfig

REPO_ROOT = Path(__file__).parents[3]

PUBLISHED_FILES = [
    "README.md",
    "flux1-dev.safetensors",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model.fp16-00001-of-00002.safetensors",
    "text_encoder/model.safetensors.index.json",
    "text_encoder/pytorch_model.bin",
    "tokenizer/merges.txt",
    "tokenizer/spiece.model",
    "tokenizer/tokenizer.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "unet_2/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
]
ASK = [
    lambda checkpoint: detect_family(checkpoint, None),
    lambda checkpoint: fetch_configs(checkpoint),
    lambda checkpoint: fetch_checkpoint(checkpoint, ["unet"]),
]
"""All functions that query the hub."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A local folder with a `unet` and an index, and no weights."""
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    (tmp_path / "unet").mkdir()
    return tmp_path


@pytest.fixture
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes huggingface_hub offline, with an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def start_python(code: str, home: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=home,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def downloaded(components: list[str], variant: str | None) -> list[str]:
    allow, ignore = plan_hub_patterns(components, variant)
    return list(filter_repo_objects(PUBLISHED_FILES, allow_patterns=allow, ignore_patterns=ignore))


@pytest.mark.parametrize("family", FAMILY_BY_PIPELINE.values())
def test_a_tiny_checkpoint_says_its_family_in_its_name(family: str) -> None:
    assert detect_family(f"tiny://{family}", None) == family


@pytest.mark.parametrize(("pipeline", "family"), FAMILY_BY_PIPELINE.items())
def test_a_local_folder_says_its_family_in_its_index(checkpoint: Path, pipeline: str, family: str) -> None:
    (checkpoint / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    assert detect_family(str(checkpoint), None) == family


def test_an_unknown_pipeline_class_is_refused_with_a_way_out(checkpoint: Path) -> None:
    (checkpoint / "model_index.json").write_text(json.dumps({"_class_name": "ShapEPipeline"}))
    with pytest.raises(ValueError, match=r"is a ShapEPipeline, which cannot be served: .*set `family:`"):
        with_family(ModelConfig(name="x", checkpoint=str(checkpoint)))


def test_an_unknown_tiny_family_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'tiny://dalle'.*flux, sd15, sdxl, sd3, qwen-image, wan"):
        fetch_checkpoint("tiny://dalle", [])


def test_an_embedded_checkpoint_lies_in_the_package_and_says_its_family_in_its_index() -> None:
    folder = fetch_checkpoint("embedded://shapes", ["transformer", "vae", "text_encoder", "tokenizer_2"])
    assert folder == REPO_ROOT / "deployments" / "checkpoints" / "embedded" / "shapes"
    assert detect_family("embedded://shapes", None) == "flux"


@pytest.mark.parametrize("name", ["cats", "", "../shapes", "shapes/vae"])
def test_an_unknown_embedded_checkpoint_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(ValueError, match="is not embedded; choose one of: shapes"):
        fetch_checkpoint(f"embedded://{name}", [])
    with pytest.raises(ValueError, match="is not embedded; choose one of: shapes"):
        detect_family(f"embedded://{name}", None)


@pytest.mark.parametrize("path", ["/no/such/model", "./no/such", "../no-such", "~/no-such-model"])
def test_a_path_that_does_not_exist_is_never_taken_for_a_hub_id(path: str) -> None:
    with pytest.raises(FileNotFoundError, match="looks like a path"):
        detect_family(path, None)
    with pytest.raises(FileNotFoundError, match="looks like a path"):
        fetch_checkpoint(path, ["unet"])


def test_a_local_folder_is_returned_as_it_is(checkpoint: Path) -> None:
    assert fetch_checkpoint(str(checkpoint), ["unet"]) == checkpoint


def test_a_relative_folder_that_exists_wins_over_a_hub_id(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    assert fetch_checkpoint(checkpoint.name, ["unet"]).samefile(checkpoint)


def test_missing_components_are_named_beside_those_present(checkpoint: Path) -> None:
    with pytest.raises(FileNotFoundError, match="lacks tokenizer, vae; it holds unet"):
        fetch_checkpoint(str(checkpoint), ["vae", "unet", "tokenizer"])


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no model_index\.json"):
        detect_family(str(tmp_path), None)
    with pytest.raises(FileNotFoundError, match=r"has no model_index\.json"):
        fetch_checkpoint(str(tmp_path), [])


def test_a_single_file_without_a_layout_is_refused(tmp_path: Path) -> None:
    weights = tmp_path / "flux1-dev.safetensors"
    weights.touch()
    with pytest.raises(FileNotFoundError, match=r"flux1-dev\.safetensors is a single file of weights"):
        fetch_checkpoint(str(weights), [])


@pytest.mark.usefixtures("empty_hub")
@pytest.mark.parametrize("ask", ASK)
def test_any_other_name_is_asked_of_the_hub_and_may_have_meant_a_folder(ask: Callable[[str], object]) -> None:
    with pytest.raises(FileNotFoundError, match="could not be fetched from the hub") as refused:
        ask("some-org/some-model")
    folder = Path("some-org/some-model").absolute()
    assert f"{folder} does not exist on node {socket.gethostname()} either" in str(refused.value)


@pytest.mark.parametrize("ask", ASK)
def test_a_name_that_no_repository_can_have_is_refused(ask: Callable[[str], object]) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"'models/of/mine' is not on the hub.*models/of/mine does not exist"
    ):
        ask("models/of/mine")


class Hub(BaseHTTPRequestHandler):
    """A hub with one gated model and no other."""

    def do_GET(self) -> None:
        is_gated = "/gated/model" in self.path
        self.send_response(403 if is_gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if is_gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def small_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replaces huggingface.co by the local hub."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        for module in ("constants", "hf_api", "file_download"):
            monkeypatch.setattr(f"huggingface_hub.{module}.ENDPOINT", url, raising=False)
            monkeypatch.setattr(
                f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE",
                url + "/{repo_id}/resolve/{revision}/{filename}",
                raising=False,
            )
        yield
        server.shutdown()


@pytest.mark.usefixtures("small_hub")
@pytest.mark.parametrize("ask", ASK)
def test_a_gated_model_says_where_its_licence_is_accepted(ask: Callable[[str], object]) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"accept its licence at https://huggingface\.co/gated/model, and set HF_TOKEN"
    ):
        ask("gated/model")


@pytest.mark.usefixtures("small_hub")
@pytest.mark.parametrize("ask", ASK)
def test_a_model_that_the_hub_does_not_have_may_be_private(ask: Callable[[str], object]) -> None:
    with pytest.raises(FileNotFoundError, match=r"'no/model' is not on the hub, or private \(then set HF_TOKEN\)"):
        ask("no/model")


def test_a_download_takes_only_the_plain_safetensors_of_the_named_components() -> None:
    assert downloaded(["unet", "text_encoder"], variant=None) == [
        "model_index.json",
        "text_encoder/config.json",
        "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model.safetensors.index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]


def test_a_download_of_a_variant_takes_only_its_weights() -> None:
    assert downloaded(["unet", "text_encoder"], variant="fp16") == [
        "model_index.json",
        "text_encoder/config.json",
        "text_encoder/model.fp16-00001-of-00002.safetensors",
        "text_encoder/model.safetensors.index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    ]


def test_a_download_takes_whole_tokenizers_and_schedulers() -> None:
    assert downloaded(["scheduler", "tokenizer"], variant=None) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/merges.txt",
        "tokenizer/spiece.model",
        "tokenizer/tokenizer.json",
    ]


def test_asking_for_checkpoints_imports_neither_torch_nor_diffusers(tmp_path: Path) -> None:
    code = (
        "import sys; from deployments.checkpoints import source; "
        "print({'torch', 'diffusers', 'transformers', 'ray'} & set(sys.modules))"
    )
    stdout, stderr = start_python(code, tmp_path).communicate(timeout=60)
    assert stdout.strip() == "set()", stderr


def test_processes_that_ask_at_once_share_one_complete_tiny_checkpoint(tmp_path: Path) -> None:
    code = (
        "import sys; from deployments.checkpoints.source import fetch_checkpoint; "
        "folder = fetch_checkpoint('tiny://sd15', ['unet', 'vae', 'text_encoder', 'tokenizer']); "
        "print(folder, 'torch' in sys.modules)"
    )
    processes = [start_python(code, tmp_path) for _ in range(4)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0, 0], outputs
    answers = [stdout.split() for stdout, _ in outputs]
    assert len({folder for folder, _ in answers}) == 1
    assert [has_written for _, has_written in answers].count("True") == 1
    folder = Path(answers[0][0])
    assert {entry.name for entry in folder.parent.iterdir()} == {"sd15", "sd15.lock"}
    assert detect_family(str(folder), None) == "sd15"

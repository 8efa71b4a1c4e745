"""Runs every config for GPUs on a GPU, with tiny weights in place of the model's."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.config.stage import StageConfig
from deployments.stages import load_stage
from deployments.stages.tensors import each_tensor
from serve_app.config.serve_file import load_app_config
from tests.deployments.memory.tiny_request import build_request
from tests.tiny_models import EXPERTS, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
CONFIGS = sorted(
    path
    for path in (Path(__file__).parent.parent / "configs").glob("*.yaml")
    for served in load_app_config(path).served
    if load_app_config(path).is_one and served.encoder.num_gpus and served.model.family
)
"""Configs of the six families: those of other pipelines use no memory technique of their own."""
TINY_GIB = 1e-4
"""Limit for a tiny model's weights on the GPU: a part of them, as the config's limit is of the real weights."""
MOVES = ("offload", "vram_limit_gib", "time_sharing", "compile")


def tiny(config: StageConfig, **settings: Any) -> StageConfig:
    """Returns the stage's config for a tiny model alone on the GPU, compiled only if torch can do so here."""
    changes: dict[str, Any] = {"num_gpus": 1.0, "host_copy": "memory", **settings}
    if config.vram_limit_gib is not None:
        changes.setdefault("vram_limit_gib", TINY_GIB)
    if config.compile is not None and find_spec("triton") is None:
        changes.setdefault("compile", {"scope": config.compile.scope, "backend": "eager"})
    return type(config).model_validate(config.model_dump() | changes)


def draw(path: Path, **settings: Any) -> tuple[Any, torch.Tensor, Any]:
    """Returns embeddings, latents and frames."""
    [app] = load_app_config(path).served
    assert app.model.family is not None
    name = EXPERTS if path.stem.startswith("wan22") else app.model.family
    model, request = tiny_model(name), replace(build_request(name), num_inference_steps=3)
    tokens = 64 if model.architecture.max_sequence_length else None
    encoding = load_stage("encode", model, tiny(app.encoder, max_sequence_length=tokens, **settings))
    denoising = load_stage("denoise", model, tiny(app.transformer, shards=1, context_parallel=1, **settings))
    denoising.connect(None, pytest.fail)
    decoding = load_stage("decode", model, tiny(app.vae, **settings))
    for _ in range(2):  # by the second time weights were unloaded and reloaded, and layers are prefetched
        encodings = encoding.encode(request)
        seat = denoising.join()
        arguments = denoising.denoise(seat, encodings, request)
        denoising.leave(seat)
        frames = decoding.decode(arguments, request)
    denoising.close()
    return list(each_tensor(encodings)), arguments.latents, frames


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_draws_what_it_draws_where_all_weights_lie_on_the_gpu(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # folder of the leases' locks and of weights on disk
    embeds, latents, frames = draw(path)
    at_rest = draw(path, **dict.fromkeys(MOVES))
    assert all(torch.equal(one, other) for one, other in zip(embeds, at_rest[0], strict=True))
    assert torch.equal(latents, at_rest[1])
    assert (frames == at_rest[2]).all()

"""Text encoders over several GPUs encode what they encode on one, bit for bit."""

from collections import Counter
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from cluster.machines.inventory import parse_gpus
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.families import FAMILIES
from deployments.plan.place import plan_placement
from deployments.plan.plan import StageConfigs, demands_of
from deployments.stages import load_stage
from deployments.stages.tensors import each_tensor
from tests.deployments.memory.tiny_request import build_request
from tests.deployments.plan.published import sizes_of


def encode(family: str, **settings: Any) -> tuple[list[torch.Tensor], Counter[str]]:
    """Returns embeddings, and the bytes of weights by device."""
    model = ModelConfig(name="tiny", checkpoint=f"tiny://{family}", family=family)
    tokens = 64 if FAMILIES[family].max_sequence_length else None
    stage = load_stage("encode", model, EncoderConfig(max_sequence_length=tokens, **settings))
    embeds = stage.encode(build_request(family))
    weights: Counter[str] = Counter()
    for place_and_dtype, num_bytes in stage.residency.stats().weights_bytes.items():
        weights[place_and_dtype.partition(" ")[0]] += num_bytes
    return list(each_tensor(embeds)), weights


def assert_equal(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("family", ["flux", "qwen-image", "wan"])
@pytest.mark.parametrize(("share", "places"), [(2.0, {"cpu"}), (0.75, {"cpu", "offloaded"})])
def test_without_gpus_encoders_lie_on_the_cpu_and_what_is_too_much_on_disk(
    family: str, share: float, places: set[str]
) -> None:
    expected, whole = encode(family)
    memory = {"cpu": f"{int(share * whole.total()) // 2**10}KiB"}
    got, weights = encode(family, device_map="balanced", max_memory=memory)
    assert set(weights) == places
    assert_equal(got, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"sd15"}))  # its tiny encoder is mostly one layer
def test_encoders_over_two_gpus_encode_what_they_do_on_one(family: str) -> None:
    """No GPU holds more than `max_memory` says, without which one GPU would have room for encoders this small."""
    expected, whole = encode(family, num_gpus=1)
    most = int(0.7 * whole.total()) // 2**10
    memory = {"0": f"{most}KiB", "1": "100MiB"}
    got, weights = encode(family, num_gpus=2, device_map="balanced", max_memory=memory)
    assert set(weights) == {"cuda:0", "cuda:1"}
    assert weights["cuda:0"] <= most * 2**10
    assert_equal(got, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("family", ["flux", "sdxl", "sd3"])
def test_several_encoders_are_balanced_as_if_they_were_one(family: str) -> None:
    expected, whole = encode(family, num_gpus=1)
    got, weights = encode(family, num_gpus=2, device_map="balanced")
    assert set(weights) == {"cuda:0", "cuda:1"}
    assert max(weights.values()) < 0.75 * whole.total()
    assert_equal(got, expected)


def test_encoders_that_fit_no_gpu_alone_are_planned_on_two() -> None:
    """The encoder is Qwen2.5-VL, with 15.5 GiB of weights."""

    def lacks(**settings: Any) -> list[str]:
        encoder = EncoderConfig.model_validate({"dtype": "bfloat16", **settings})
        stages = StageConfigs(encoder, TransformerConfig(device="cpu"), VaeConfig(device="cpu"))
        return plan_placement(
            demands_of(stages, sizes_of("qwen-image")(stages)), parse_gpus("2x12GiB")
        ).shortfalls()

    assert lacks(num_gpus=1)
    assert not lacks(num_gpus=2, device_map="balanced")


def test_quantised_encoders_are_not_spread() -> None:
    with pytest.raises(ValidationError, match="quantization and device_map do not combine for text encoders"):
        EncoderConfig.model_validate({"device_map": "balanced", "quantization": "nf4"})

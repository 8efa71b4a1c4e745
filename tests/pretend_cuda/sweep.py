"""Lists the tests that run on the simulated device: those for GPUs, and some of the CPU's, with a GPU for every
stage.

None of their assertions may differ there.
"""

import re
from collections.abc import Iterable

import pytest

MEMORY = "deployments/memory"
ALWAYS: tuple[str, ...] = (
    f"{MEMORY}/test_techniques.py::test_the_encoder_gives_the_same_embeddings",
    f"{MEMORY}/test_techniques.py::test_the_vae_decodes_the_same_pixels",
    f"{MEMORY}/test_vram_limit.py::test_every_family_draws_the_same_under_a_limit[flux-",
    f"{MEMORY}/test_vram_limit.py::test_every_family_draws_the_same_under_a_limit[wan-plain",
    f"{MEMORY}/test_vram_limit.py::test_text_encoders_under_a_limit",
    f"{MEMORY}/test_vram_limit.py::test_a_vae_under_a_limit",
    "deployments/test_encoder.py",
    "deployments/test_transformer.py",
    "deployments/test_vae.py",
    "deployments/stages/test_warm_up.py::test_a_replica_is_warm_once_it_is_built",
)
"""Test files, or prefixes of the names of their tests."""

THOROUGH: tuple[str, ...] = (
    f"{MEMORY}/test_residency.py",
    f"{MEMORY}/test_mapped.py",
    f"{MEMORY}/test_techniques.py",
    f"{MEMORY}/test_vram_limit.py::test_every_family_draws_the_same_under_a_limit",
    "deployments/stages/texts/test_encoder_forwards.py",
    "deployments/stages/pixels/test_tiles.py",
    "deployments/stages/test_warm_up.py",
)

CONFIG = "test_configs_on_gpu.py::test_a_config_draws_what_it_draws_where_all_weights_lie_on_the_gpu"
MOVES = f"{MEMORY}/test_on_gpu.py::test_what_moves_weights_draws_what_the_same_weights_draw_at_rest"
EXPERTS = f"{MEMORY}/test_on_gpu.py::test_two_experts_draw_what_they_draw_at_rest"
RANKS = "deployments/engine/test_on_gpus.py::test_ranks_draw_what_one_does"
GIVES = "deployments/stages/test_on_gpu.py::test_a_gpu_gives_what_the_cpu_gives"
GPU_THOROUGH: tuple[str, ...] = (
    "deployments/test_same_picture.py",
    "serve_app/test_on_gpu.py",
    *(
        f"{CONFIG}[{name}"
        for name in ("flux_dev]", "flux_dev_2x", "flux_schnell", "qwen_image]", "qwen_image_2", "sd", "wan")
    ),
    *(
        f"{MOVES}[{{{way}"
        for way in (
            "'offload': 'sequential'",
            "'offload': {'kind': 'group', 'use_stream': True, 'low_cpu_memory'",
            "'offload': {'kind': 'group', 'folder'",
            "'vram_limit_gib': 0.001, ",
            "'quantization': 'nf4', 'offload': 'model'",
            "'quantization': 'nf4', 'offload': {'kind': 'group', 'folder'",
            "'quantization': 'nf4', 'time_sharing'",
            "'quantization': 'int8', 'time_sharing'",
        )
    ),
    *(f"{EXPERTS}[{{{way}" for way in ("'offload': 'group'", "'vram", "'quantization'")),
    *(f"{RANKS}[{family}-gpus" for family in ("sd15", "sd3", "qwen-image")),
    *(f"{RANKS}[{family}-gpus{number}-gloo" for family, number in (("sdxl", 7), ("wan", 8))),
    *(f"{GIVES}[{family}]" for family in ("sd15", "sd3", "qwen-image")),
)
"""Tests for GPUs that run only with --thorough: those whose processes take long to start, while other tests assert
the same in one process; and configs, techniques and families whose parts other tests cover."""

OTHER_WAY = "on a GPU bitsandbytes takes another way than in the plain pipeline on the CPU"
EXCEPT: dict[str, str] = {
    r"test_techniques.*'(nf4|fp4|int8)'": OTHER_WAY,
    r"test_techniques.*quantise": OTHER_WAY,
    r"test_techniques.*it_saves_memory": OTHER_WAY,
    r"test_techniques.*'trace'": "torch.jit.trace does not know the pretended device",
    r"test_techniques.*is_refused_at_start": "a GPU has streams",
    r"test_techniques.*an_8_bit_model_that_moves": "another place in memory stands for a device",
    r"test_transformer.*stats_tell_blocks_bytes_and_work": "it names the CPU",
}
"""Tests that assume the CPU, as regular expressions, and the reason."""


def is_for_gpu(item: pytest.Item, *, is_thorough: bool) -> bool:
    """Whether the test needs a GPU, and is worth the time."""
    if not (item.get_closest_marker("gpu") or item.get_closest_marker("pretended_gpu")):
        return False
    return is_thorough or not _is_of(item, GPU_THOROUGH)


def is_swept(item: pytest.Item, *, is_thorough: bool) -> bool:
    if item.get_closest_marker("gpu") or any(re.search(pattern, item.nodeid) for pattern in EXCEPT):
        return False
    return _is_of(item, ALWAYS) or (is_thorough and _is_of(item, THOROUGH))


def _is_of(item: pytest.Item, beginnings: Iterable[str]) -> bool:
    return any(item.nodeid.startswith(f"tests/{beginning}") for beginning in beginnings)

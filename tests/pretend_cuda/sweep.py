"""Tests of the CPU that run again with a pretended GPU for every stage: not one claim of theirs may change."""

import pytest

MEMORY = "deployments/memory"
ALWAYS: tuple[str, ...] = (
    f"{MEMORY}/test_techniques.py::test_the_encoder_gives_the_same_embeddings",
    f"{MEMORY}/test_techniques.py::test_the_vae_decodes_the_same_pixels",
    f"{MEMORY}/test_vram_limit.py::test_every_family_draws_the_same_under_a_limit",
    f"{MEMORY}/test_vram_limit.py::test_text_encoders_under_a_limit",
    f"{MEMORY}/test_vram_limit.py::test_a_vae_under_a_limit",
    "deployments/test_encoder.py",
    "deployments/test_transformer.py",
    "deployments/test_vae.py",
    "deployments/test_warm_up.py::test_a_replica_is_warm_once_it_is_built",
)
"""Files, or beginnings of the names of their tests."""

THOROUGH: tuple[str, ...] = (
    f"{MEMORY}/test_keeper.py",
    f"{MEMORY}/test_mapped.py",
    f"{MEMORY}/test_techniques.py",
    "deployments/test_warm_up.py",
)

EXCEPT: dict[str, str] = {
    f"{MEMORY}/test_techniques.py::test_what_does_not_suit_the_model_is_refused_at_start": "a GPU has streams",
    f"{MEMORY}/test_techniques.py::test_an_8_bit_model_that_moves": "another place in memory stands for a device",
}
"""What assumes the CPU, and why."""


def is_swept(item: pytest.Item, *, is_thorough: bool) -> bool:
    name = item.nodeid.removeprefix("tests/")
    if any(name.startswith(left_out) for left_out in EXCEPT):
        return False
    return any(name.startswith(path) for path in (*ALWAYS, *(THOROUGH if is_thorough else ())))

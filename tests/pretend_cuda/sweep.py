"""Tests of the CPU that run again with a pretended GPU for every stage: not one claim of theirs may change."""

import pytest

ALWAYS: tuple[str, ...] = (
    "deployments/memory/test_vram_limit.py",
    "deployments/memory/test_on_demand.py",
    "deployments/memory/test_tiling.py",
    "deployments/engine/test_engine.py",
    "deployments/engine/test_shard.py",
    "deployments/stages/test_decode.py",
    "deployments/stages/test_partial.py",
    "deployments/test_encoder.py",
    "deployments/test_transformer.py",
    "deployments/test_vae.py",
    "deployments/test_memory_limit.py",
)
"""Files, or beginnings of the names of their tests."""

THOROUGH: tuple[str, ...] = (
    "deployments/memory/test_techniques.py",
    "deployments/memory/test_keeper.py",
    "deployments/memory/test_mapped.py",
    "deployments/test_warm_up.py",
    "deployments/test_same_picture.py",
)

EXCEPT: dict[str, str] = {}
"""What assumes the CPU, and why."""


def is_swept(item: pytest.Item, *, is_thorough: bool) -> bool:
    name = item.nodeid.removeprefix("tests/")
    if any(name.startswith(left_out) for left_out in EXCEPT):
        return False
    return any(name.startswith(path) for path in (*ALWAYS, *(THOROUGH if is_thorough else ())))

"""Fixtures of memory tests. bitsandbytes runs on the CPU, but diffusers requires a GPU for it."""

import tempfile
from pathlib import Path

import bitsandbytes.nn.modules
import pytest
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer


@pytest.fixture
def own_leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the leases of the device to this test, so that no other run on this machine waits for them."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def quantize_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disables diffusers' check for a GPU, and the device map that would name one.

    Also disables the kernels that bitsandbytes uses on CPUs with AVX512-BF16: they need columns of 32, and round
    coarsely.
    """
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda *_args, **_kwargs: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda _self, device_map: device_map)

"""bitsandbytes runs on the CPU; diffusers looks for a GPU all the same."""

import pytest
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer


@pytest.fixture
def quantize_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets diffusers' check for a GPU aside, and the device map that would name one."""
    for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda *_args, **_kwargs: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda _self, device_map: device_map)

"""Loads the native library as a Python module."""

import importlib.util
import os
from typing import Any


def load_native() -> Any:
    spec = importlib.util.spec_from_file_location("pretend_cuda_native", os.environ["PRETEND_CUDA"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

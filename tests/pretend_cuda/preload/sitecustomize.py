"""On PYTHONPATH, in every Python process below: as soon as torch is imported, it has a pretended CUDA.

PRETEND_CUDA          the built library; without it nothing happens
PRETEND_CUDA_GPUS     how many cards the machine has; CUDA_VISIBLE_DEVICES counts, so Ray's does
PRETEND_CUDA_GIB      memory of each
PRETEND_CUDA_PROBLEMS the file that problems are written to; PRETEND_CUDA_STRICT=1 raises them at the place
PRETEND_CUDA_LOST     a file; once it is there, who has its content in the command line has lost its GPU
"""

import ctypes
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class TorchFinder(importlib.abc.MetaPathFinder):
    """Loads the library before torch, which asks for CUDA's hooks once, and installs the device after it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        assert spec is not None
        assert spec.loader is not None
        ctypes.CDLL(os.environ["PRETEND_CUDA"], mode=ctypes.RTLD_GLOBAL)
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            from tests.pretend_cuda.install import install

            install()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if os.environ.get("PRETEND_CUDA"):
    sys.meta_path.insert(0, TorchFinder())

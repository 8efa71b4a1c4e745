"""Gives torch a simulated CUDA device on import, in every Python process that has this folder on its PYTHONPATH.

PRETEND_CUDA          the built library; without it nothing happens
PRETEND_CUDA_GPUS     number of cards of the machine; CUDA_VISIBLE_DEVICES, which Ray sets, selects among them
PRETEND_CUDA_GIB      memory of each card in GiB
PRETEND_CUDA_PROBLEMS the file that problems are written to; PRETEND_CUDA_STRICT=1 raises them where they occur
PRETEND_CUDA_LOST     a file; once it exists, processes with its content in their command line have lost their GPU
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
    """Loads the library before torch, which looks for CUDA's hooks once, and installs the device after it."""

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

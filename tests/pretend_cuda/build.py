"""Builds the library with the compiler that torch's own extensions need, once for each version of its sources and
of torch."""

import hashlib
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from filelock import FileLock

NATIVE = Path(__file__).parent / "native"
FOLDER = Path.home() / ".cache" / "latent-relay" / "pretend-cuda"
COMPILER = "g++"
HEADERS = Path(sysconfig.get_paths()["include"])
FLAGS = ("-O1", "-std=c++20", "-fPIC", "-shared", "-w")


class NoCompiler(Exception):
    """The compiler or Python.h is missing."""


def build() -> Path:
    """Returns the library; building it takes 20 s of a core the first time. Raises NoCompiler."""
    if shutil.which(COMPILER) is None:
        raise NoCompiler(f"the pretended CUDA device is built with {COMPILER}, and there is none: install it")
    if not (HEADERS / "Python.h").exists():
        raise NoCompiler(
            f"the pretended CUDA device is built with Python.h, which is not in {HEADERS}: install it"
        )
    FOLDER.mkdir(parents=True, exist_ok=True)
    with FileLock(FOLDER / "lock"):  # other workers of the suite wait
        library = FOLDER / f"{_version()}.so"
        if not library.exists():
            unfinished = library.with_suffix(".unfinished")
            subprocess.run(_command(unfinished), check=True)
            unfinished.rename(library)
    return library


def _version() -> str:
    """Returns a digest of everything that the library is built from."""
    digest = hashlib.sha256(f"{torch.__version__} {sys.version} {FLAGS}".encode())
    for source in sorted(NATIVE.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _command(library: Path) -> list[str]:
    root = Path(torch.__file__).parent
    includes = [root / "include", root / "include/torch/csrc/api/include", HEADERS]
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10", f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}"]
    return [
        COMPILER,
        *FLAGS,
        *(f"-I{folder}" for folder in includes),
        str(NATIVE / "module.cpp"),
        *libraries,
        "-o",
        str(library),
    ]

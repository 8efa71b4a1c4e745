"""The wheel: built from this source, and installed as a user would."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("cluster", "deployments", "serve_app")
SOURCES = (*PACKAGES, "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


def build_wheel(folder: Path) -> Path:
    """Builds the wheel with pyproject.toml's backend, without a network, from a copy, so that earlier build output
    has no effect."""
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source)
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(source)]
    subprocess.run(command, check=True, timeout=120)
    [wheel] = folder.glob("*.whl")
    return wheel


def install_wheel(wheel: Path, folder: Path) -> Path:
    """Returns the folder of its commands, in a virtual environment that takes all other packages, but not this
    repository, from the current one."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    command = [*PIP, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(command, check=True, timeout=120)
    [packages] = folder.glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "others.pth").write_text("\n".join(others) + "\n")  # .pth files in those folders have no effect
    return python.parent

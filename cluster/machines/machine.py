"""Describes this machine, for readers of a measurement."""

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path

from cluster.machines import accelerator

LIBRARIES = ("torch", "diffusers", "transformers", "ray")


def describe_machine() -> dict[str, str]:
    """Returns processor, cores, memory, GPUs, versions and today's date, as short strings."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{memory_gib:.0f} GiB",
        "gpus": ", ".join(accelerator.device_names()) or "none",
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

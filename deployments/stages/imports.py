"""Skips optional packages and silences log noise when a stage process imports diffusers."""

import logging
import sys
from collections.abc import Iterable

from deployments.checkpoints.json_file import read_json
from deployments.checkpoints.source import fetch_configs
from deployments.config.model import ModelConfig
from deployments.config.stage import StageConfig
from deployments.errors import CannotServe

OPTIONAL_PACKAGES = frozenset({"bitsandbytes", "gguf", "peft", "torchao"})
"""Packages not needed unless weights are quantised or the model takes adapters."""
NOISE = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
    "diffusers.quantizers.gguf.gguf_quantizer": "is required to remain in FP32, dequantizing now",
    "transformers.utils.import_utils": "requires torchvision (not installed); falling back to",
}
"""Log messages, by logger, that wrongly suggest a problem, with unneeded optional packages or with layers."""


def silence_imports() -> None:
    """Keeps NOISE out of the log."""
    for name in NOISE:
        logging.getLogger(name).addFilter(_is_no_noise)


def _is_no_noise(record: logging.LogRecord) -> bool:
    return NOISE[record.name] not in record.getMessage()


def skip_unneeded(model: ModelConfig, config: StageConfig) -> None:
    """Skips packages that this stage does not need. Raises CannotServe if a needed one is skipped already."""
    needed = needed_packages(model, config)
    if "diffusers" not in sys.modules:
        skip(OPTIONAL_PACKAGES - needed)
    elif skipped := sorted(name for name in needed if name in sys.modules and sys.modules[name] is None):
        raise CannotServe(
            f"{model.checkpoint} needs {', '.join(skipped)} here, but did not where the app was built: build the "
            "app where the same files are"
        )


def skip(packages: Iterable[str]) -> None:
    """Makes diffusers and transformers treat packages as not installed: imports take seconds at every start.

    None in `sys.modules` is Python's own mark for a module that must not be imported
    (https://docs.python.org/3/reference/import.html#the-module-cache); the libraries take it for not installed.
    """
    sys.modules.update(dict.fromkeys(packages))  # type: ignore[arg-type]


def needed_packages(model: ModelConfig, config: StageConfig) -> frozenset[str]:
    """Returns the packages of OPTIONAL_PACKAGES that this stage does need. Raises what `fetch_configs` raises."""
    methods = stored_methods(model)
    files = (model.checkpoint, *model.components.values())
    is_needed = {
        "bitsandbytes": config.quantization is not None or bool(methods - {"torchao"}),
        "peft": model.takes_adapters,
        "gguf": any(file.endswith(".gguf") for file in files),
        "torchao": "torchao" in methods,
    }
    return frozenset(name for name, needed in is_needed.items() if needed)


def stored_methods(model: ModelConfig) -> frozenset[str]:
    """Returns the quantisation methods of stored components, from their configs; "" if a config names none."""
    configs = fetch_configs(model.layout, revision=model.revision).glob("*/config.json")
    stored = [read_json(path).get("quantization_config") for path in configs]
    return frozenset(str(each.get("quant_method") or "") for each in stored if isinstance(each, dict))

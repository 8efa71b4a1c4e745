"""What a process that is about to import diffusers can do without."""

import logging
import sys

from deployments.checkpoints.json_file import read_json
from deployments.checkpoints.source import fetch_configs
from deployments.config import ModelConfig, StageConfig

NOISE = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
    "diffusers.quantizers.gguf.gguf_quantizer": "is required to remain in FP32, dequantizing now",
    "transformers.utils.import_utils": "requires torchvision (not installed); falling back to",
}
"""What loggers say of optional packages that nothing here needs, or of layers, as if something had gone wrong."""


def silence_imports() -> None:
    """Leave that out of the log."""
    for name in NOISE:
        logging.getLogger(name).addFilter(_is_no_noise)


def _is_no_noise(record: logging.LogRecord) -> bool:
    return NOISE[record.name] not in record.getMessage()


def skip_unneeded(model: ModelConfig, config: StageConfig) -> None:
    """diffusers and transformers import these packages wherever they are installed: up to seconds of every start.

    None in `sys.modules` is Python's own word for a module that must not be imported
    (https://docs.python.org/3/reference/import.html#the-module-cache); the libraries take it for not installed.
    """
    if "diffusers" in sys.modules:
        return
    methods = stored_methods(model)
    files = (model.checkpoint, *model.components.values())
    is_needed = {
        "bitsandbytes": config.quantization is not None or bool(methods - {"torchao"}),
        "gguf": any(file.endswith(".gguf") for file in files),
        "torchao": "torchao" in methods,
    }
    sys.modules.update(dict.fromkeys(name for name, needed in is_needed.items() if not needed))  # type: ignore[arg-type]


def stored_methods(model: ModelConfig) -> frozenset[str]:
    """By which methods some components are stored quantised, as their own configs say; "" where one says none."""
    configs = fetch_configs(model.layout, revision=model.revision).glob("*/config.json")
    stored = [read_json(path).get("quantization_config") for path in configs]
    return frozenset(str(each.get("quant_method") or "") for each in stored if isinstance(each, dict))

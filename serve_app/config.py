"""The whole of what a YAML file may say under `args:`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from PIL import Image
from pydantic import Field, model_validator

from cluster.config import Config, find_mistakes
from deployments.config import EncoderConfig, ModelConfig, StageConfig, TransformerConfig, VaeConfig

APP_NAME = "relay"
IMPORT_PATH = "serve_app.app:build_app"


class LimitsConfig(Config):
    """What one request may ask for, and how many there may be at once."""

    max_pixels: int = Field(2048 * 2048, ge=64, description="width times height")
    max_num_inference_steps: int = Field(150, ge=1)
    max_prompt_characters: int = Field(4000, ge=1, description="of the prompt, and of the negative prompt")
    max_num_frames: int = Field(161, ge=1, description="frames of a video")
    max_image_bytes: int = Field(20 * 2**20, ge=1024, description="of each picture that goes in, as a file")
    max_image_pixels: int = Field(
        25_000_000,
        ge=64 * 64,
        le=Image.MAX_IMAGE_PIXELS,
        description="of each picture that goes in, and of each frame of a video: what phones take by default; a "
        "stage that opens it needs 3 bytes for each, with transparency 15, and for a video 30",
    )
    max_video_bytes: int = Field(64 * 2**20, ge=1024, description="of a video that goes in, as a file")
    max_concurrent_requests: int = Field(
        256, ge=1, description="requests in progress per ingress replica; one more gets a 429"
    )
    request_timeout_s: float = Field(600.0, gt=0, description="from arrival to answer; then a 504")


class IngressConfig(Config):
    """The deployment that HTTP meets. It holds no tensors: one replica serves many GPUs."""

    num_replicas: int = Field(
        2, ge=1, description="150 MB each; with a second one the door stays open when the first is lost"
    )
    num_cpus: float = Field(0.0, ge=0, description="logical CPUs Ray reserves for each replica")
    on_head: bool = Field(
        True, description="on the head node: no other node's death takes an accepted request; false: anywhere"
    )


class AppConfig(Config):
    """One served checkpoint: the model, its three stages, and the limits of a request."""

    model: ModelConfig
    encoder: EncoderConfig = EncoderConfig()
    transformer: TransformerConfig = TransformerConfig()
    vae: VaeConfig = VaeConfig()
    ingress: IngressConfig = IngressConfig()
    limits: LimitsConfig = LimitsConfig()

    @model_validator(mode="after")
    def _check_adapters(self) -> Self:
        if self.model.takes_adapters:
            if self.transformer.tensor_parallel > 1:
                raise ValueError(
                    "transformer.tensor_parallel: adapters have no parts for ranks that have parts of a layer: "
                    "use context_parallel, or shards"
                )
            if self.transformer.trace:
                raise ValueError("transformer.trace: a traced graph knows no adapters: use compile: blocks")
        return self

    @property
    def stages(self) -> dict[str, StageConfig]:
        """By their names here, in the order in which a request meets them."""
        return {"encoder": self.encoder, "transformer": self.transformer, "vae": self.vae}


class ConfigError(ValueError):
    """A config that cannot be served: one line per mistake."""


def load_app_config(path: Path) -> AppConfig:
    """The `args` of the application in a Serve YAML file that serves a checkpoint. Raises ConfigError."""
    ours = find_our_applications(path, read_serve_file(path))
    if len(ours) != 1:
        names = ", ".join(str(each.get("name")) for each in ours) or "none"
        raise ConfigError(
            f"{path}: one application must have import_path: {IMPORT_PATH}, got {names}; "
            "write the one that is meant into a file of its own"
        )
    return parse_app_config(ours[0].get("args") or {}, source=str(path))


class _UniqueKeys(yaml.SafeLoader):
    """Of a key that is there twice, YAML would take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                problem = f"the key {key.value!r} is there twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add((key.tag, key.value))
        return node


def read_serve_file(path: Path) -> dict[str, Any]:
    """The YAML of a Serve config. Raises ConfigError where there is no such file, or it is no YAML."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        config = yaml.load(text, Loader=_UniqueKeys)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise ConfigError(f"{path}{where}: {error.problem or error.context}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise ConfigError(f"{path}: {why}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: not a Ray Serve config, for it has no keys such as applications")
    return config


def find_our_applications(path: Path, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those that serve a checkpoint. Raises ConfigError where applications are none."""
    applications = config.get("applications")
    is_list = isinstance(applications, list) and all(isinstance(each, dict) for each in applications)
    if not (is_list and applications):
        raise ConfigError(
            f"{path}: not a Ray Serve config with applications, a list of name, import_path and args"
        )
    return [each for each in applications if each.get("import_path") == IMPORT_PATH]


def parse_app_config(args: Any, *, source: str = "") -> AppConfig:
    """Raises ConfigError with one line per mistake, each naming the key and what is allowed."""
    mistakes = find_mistakes(AppConfig, args)
    if mistakes:
        raise ConfigError("\n".join(f"{source}: {line}" if source else line for line in mistakes))
    return AppConfig.model_validate(args)

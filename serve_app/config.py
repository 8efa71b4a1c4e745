"""The whole of what a YAML file may say under `args:`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import yaml
from PIL import Image
from pydantic import Field, model_validator

from cluster.config import Config, find_mistakes
from deployments.config import EncoderConfig, ModelConfig, StageConfig, TransformerConfig, VaeConfig
from serve_app.auth.config import Access, AuthConfig, CorsConfig
from serve_app.jobs.config import DEFAULT_JOBS, JobsConfig

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


class ServedModelConfig(Config):
    """One served checkpoint: the model and its three stages."""

    model: ModelConfig
    encoder: EncoderConfig = EncoderConfig()
    transformer: TransformerConfig = TransformerConfig()
    vae: VaeConfig = VaeConfig()

    @property
    def name(self) -> str:
        return self.model.name

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

    @property
    def holders(self) -> dict[str, str]:
        """By stage the name of the model whose it is: this one's, or the one that it is shared with."""
        shared = {"encoder": self.encoder.shared_with, "transformer": None, "vae": self.vae.shared_with}
        return {stage: holder or self.name for stage, holder in shared.items()}


class AppConfig(Config):
    """One application: one served model, or several behind one ingress, and the limits of a request."""

    model: ModelConfig | None = None
    encoder: EncoderConfig | None = None
    transformer: TransformerConfig | None = None
    vae: VaeConfig | None = None
    models: tuple[ServedModelConfig, ...] = Field(
        (),
        description="several served models in place of one: a list, each with a `model`, `encoder`, `transformer` "
        "and `vae` of its own",
    )
    ingress: IngressConfig = IngressConfig()
    limits: LimitsConfig = LimitsConfig()
    jobs: JobsConfig = DEFAULT_JOBS
    auth: AuthConfig | None = None
    cors: CorsConfig | None = None
    open: bool = Field(
        False, description="let everybody in who reaches `http_options.host`: without `auth` it must be loopback"
    )

    @property
    def access(self) -> Access:
        return Access(self.auth, self.cors, self.open)

    @property
    def is_one(self) -> bool:
        return len(self.served) == 1

    @property
    def served(self) -> tuple[ServedModelConfig, ...]:
        """Whichever way they were said, a stage that is shared as its holder says. A request that names none means
        the first."""
        if self.model is None:
            return tuple(map(self._with_shared, self.models))
        stages = {"encoder": self.encoder, "transformer": self.transformer, "vae": self.vae}
        said = {name: stage for name, stage in stages.items() if stage is not None}
        return (ServedModelConfig.model_validate({"model": self.model, **said}),)

    def _with_shared(self, served: ServedModelConfig) -> ServedModelConfig:
        said = {of.name: of for of in self.models}
        shared = {stage: holder for stage, holder in served.holders.items() if holder != served.name}
        held = {
            stage: said[holder].stages[stage].model_copy(update={"shared_with": holder})
            for stage, holder in shared.items()
        }
        return served.model_copy(update=held)

    def serving(self, models: Sequence[ServedModelConfig]) -> Self:
        """The same application of these instead, as many."""
        if self.model is None:
            return self.model_copy(update={"models": tuple(models)})
        [only] = models
        return self.model_copy(update={"model": only.model, **only.stages})

    @contextmanager
    def naming(self, served: ServedModelConfig) -> Iterator[None]:
        """A ConfigError in it says whose mistakes they are, where there are several models."""
        try:
            yield
        except ConfigError as error:
            if self.is_one:
                raise
            lines = [f"model {served.name!r}: {line}" for line in str(error).splitlines()]
            raise ConfigError("\n".join(lines)) from error

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        if self.model is None and not self.models:
            raise ValueError("model is missing: say which checkpoint is served, or several under models")
        if self.models:
            twice = [
                name for name in ("model", "encoder", "transformer", "vae") if getattr(self, name) is not None
            ]
            if twice:
                raise ValueError(f"{twice[0]} stands beside models: say it in an entry of models")
        names = [deployed_name(served.name) for served in self.models]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise ValueError(
                    f"models.{i}.model.name: {self.models[i].name!r} is taken: names must differ in letters, "
                    "digits, - or _"
                )
        check_shared(self.models or self.served)
        return self


def check_shared(models: Sequence[ServedModelConfig]) -> None:
    """Raises ValueError where a stage cannot be shared as it is said, whatever the checkpoints hold."""
    said = {served.name: served for served in models}
    for i, served in enumerate(models):
        for stage, holder in served.holders.items():
            if holder == served.name:
                continue
            place = f"models.{i}.{stage}.shared_with"
            more = served.stages[stage].model_fields_set - {"shared_with"}
            if holder not in said:
                raise ValueError(f"{place}: {holder!r} is none of the models: {', '.join(said)}")
            if said[holder].holders[stage] != holder:
                raise ValueError(f"{place}: {holder!r} has none of its own: name {said[holder].holders[stage]!r}")
            if more:
                raise ValueError(f"{place}: {holder!r} says how it runs: leave out {', '.join(sorted(more))}")
            if not said[holder].stages[stage].min_replicas:
                raise ValueError(
                    f"{place}: what several models share does not sleep: set min_replicas of {holder!r}'s {stage} "
                    "to 1 or more"
                )


def deployed_name(name: str) -> str:
    """What of a model's name can be part of a deployment's, and so of files' names."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)


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

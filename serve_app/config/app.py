"""All keys that a YAML file may have under `args:`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

from pydantic import Field, model_validator

from cluster.config import Config
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from serve_app.auth.config import Access, AuthConfig, CorsConfig
from serve_app.config.limits import LimitsConfig
from serve_app.config.served_model import ServedModelConfig, check_shared, deployed_name
from serve_app.inputs.lora import SEPARATOR
from serve_app.jobs.config import DEFAULT_JOBS, JobsConfig


class IngressConfig(Config):
    """The deployment that answers HTTP. It holds no tensors: one replica serves many GPUs."""

    num_replicas: int = Field(
        2, ge=1, description="each takes 150 MB; with two, requests are answered while one is lost"
    )
    num_cpus: float = Field(0.0, ge=0, description="logical CPUs that Ray reserves for each replica")
    on_head: bool = Field(
        True,
        description="true: run on the head node, so that the death of another node loses no accepted request; "
        "false: run anywhere",
    )


class AppConfig(Config):
    """One application: one served model, or several behind one ingress, and the limits of a request."""

    model: ModelConfig | None = None
    encoder: EncoderConfig | None = None
    transformer: TransformerConfig | None = None
    vae: VaeConfig | None = None
    models: tuple[ServedModelConfig, ...] = Field(
        (),
        description="several served models instead of one: a list of entries with their own `model`, `encoder`, "
        "`transformer` and `vae`",
    )
    ingress: IngressConfig = IngressConfig()
    limits: LimitsConfig = LimitsConfig()
    jobs: JobsConfig = DEFAULT_JOBS
    auth: AuthConfig | None = None
    cors: CorsConfig | None = None
    open: bool = Field(
        False,
        description="everybody who can reach `http_options.host` may send requests; required for a host that is "
        "not loopback, unless `auth` is set",
    )

    @property
    def access(self) -> Access:
        return Access(self.auth, self.cors, self.open)

    @property
    def is_one(self) -> bool:
        return len(self.served) == 1

    @property
    def served(self) -> tuple[ServedModelConfig, ...]:
        """All served models, from either `model` or `models`, with shared stages replaced by their owner's. A
        request that names no model means the first."""
        if self.model is None:
            return tuple(map(self._with_shared, self.models))
        stages = {"encoder": self.encoder, "transformer": self.transformer, "vae": self.vae}
        said = {name: stage for name, stage in stages.items() if stage is not None}
        return (ServedModelConfig.model_validate({"model": self.model, **said}),)

    def _with_shared(self, served: ServedModelConfig) -> ServedModelConfig:
        said = {of.name: of for of in self.models}
        shared = {stage: owner for stage, owner in served.owners.items() if owner != served.name}
        held = {
            stage: said[owner].stages[stage].model_copy(update={"shared_with": owner})
            for stage, owner in shared.items()
        }
        return served.model_copy(update=held)

    def serving(self, models: Sequence[ServedModelConfig]) -> Self:
        """Returns the same application with as many other models in place of its own."""
        if self.model is None:
            return self.model_copy(update={"models": tuple(models)})
        [only] = models
        return self.model_copy(update={"model": only.model, **only.stages})

    @contextmanager
    def naming(self, served: ServedModelConfig) -> Iterator[None]:
        """Context in which a ConfigError gets the model's name if there are several models."""
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
            raise ValueError("model is missing: set the checkpoint to serve, or list several under models")
        if self.models:
            twice = [
                name for name in ("model", "encoder", "transformer", "vae") if getattr(self, name) is not None
            ]
            if twice:
                raise ValueError(f"{twice[0]} and models do not combine: move it into an entry of models")
        names = [deployed_name(served.name) for served in self.models]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise ValueError(
                    f"models.{i}.model.name: {self.models[i].name!r} is taken: names must differ in letters, "
                    "digits, - or _"
                )
        named = {f"{of.name}{SEPARATOR}{adapter}": of for of in self.models for adapter in of.model.adapters}
        for i, served in enumerate(self.models):
            if served.name in named:
                raise ValueError(
                    f"models.{i}.model.name: {served.name!r} is also how requests name an adapter of "
                    f"{named[served.name].name!r}: rename one of them"
                )
        check_shared(self.models or self.served)
        return self


class ConfigError(ValueError):
    """A config that cannot be served: one line per mistake."""

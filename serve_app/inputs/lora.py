"""The LoRA adapters that a request asks for: by `lora`, or by an adapter's name after the model's."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from deployments.options.adapter import AdapterCatalog, ScaledAdapter
from serve_app.errors import BadRequest, UnknownModel, quoted

MAX_ADAPTERS = 8
"""Per request: each adapter costs two small matrices per layer and step."""
SEPARATOR = ":"


class LoraBody(BaseModel):
    """One adapter of a request. Beyond OpenAI."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="name of one of the model's `adapters`")
    scale: float | None = Field(None, ge=-10, le=10, description="default: the adapter's own, usually 1")


def split_model(asked: str | None, model: str) -> tuple[str | None, str | None]:
    """Splits the `model` of a request into (name of the model, name of its adapter)."""
    prefix = f"{model}{SEPARATOR}"
    if asked is not None and asked.startswith(prefix):
        return model, asked.removeprefix(prefix)
    return asked, None


def choose_adapters(
    catalog: AdapterCatalog, by_model: str | None, lora: Sequence[LoraBody]
) -> tuple[ScaledAdapter, ...]:
    """Returns the adapters of a request. by_model: the adapter in the model's name. Raises UnknownModel (a 404) or
    BadRequest."""
    asked = [LoraBody(name=by_model)] if by_model is not None else []
    asked += lora
    names = [each.name for each in asked]
    for name in names:
        if names.count(name) > 1:
            raise BadRequest(f"lora: {quoted(name)} occurs twice: add up its scales", "lora")
    return tuple(_choose(catalog, each, "model" if each.name == by_model else "lora") for each in asked)


def _choose(catalog: AdapterCatalog, asked: LoraBody, param: str) -> ScaledAdapter:
    adapter = catalog.find(asked.name)
    if adapter is None:
        there = ", ".join(catalog.entries()) or "none"
        raise UnknownModel(f"adapter {quoted(asked.name)} is not served here; served: {there}", param)
    own = catalog.entries()[asked.name].scale
    return ScaledAdapter(adapter, own if asked.scale is None else asked.scale)

"""The base of every config class: frozen, and strict about keys."""

import difflib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator


class Config(BaseModel):
    """A frozen pydantic model that refuses infinite numbers and unknown keys; the error names the allowed keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    renamed: ClassVar[Mapping[str, str]] = {}
    """New name of each key that was renamed, by its former name. Former names work for one release, with a
    warning."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            values = _with_new_names(cls, values)
            for key in values:
                if key not in cls.model_fields:
                    raise ValueError(_describe_unknown(key, cls))
        return values


def find_mistakes(kind: type[BaseModel], values: Any) -> list[str]:
    """Returns one line per mistake in values: first the unknown keys, then the invalid values."""
    known, lines = without_unknown_keys(kind, values)
    try:
        kind.model_validate(known)
    except ValidationError as error:
        lines += describe_errors(error).splitlines()
    return lines


def without_unknown_keys(kind: type[BaseModel], values: Any, place: str = "") -> tuple[Any, list[str]]:
    """Returns values without the keys that `kind` does not know, at any depth, and one line per removed key."""
    if not isinstance(values, Mapping):
        return values, []
    known, lines = {}, []
    for key, value in _with_new_names(kind, values).items():
        if key not in kind.model_fields:
            lines.append(f"{place or 'config'}: {_describe_unknown(key, kind)}")
            continue
        inner, inside = _model_in(kind.model_fields[key].annotation), f"{place}.{key}" if place else str(key)
        if inner is None:
            known[key] = value
        elif get_origin(kind.model_fields[key].annotation) is dict and isinstance(value, Mapping):
            each_of = {name: without_unknown_keys(inner, each, f"{inside}.{name}") for name, each in value.items()}
            known[key] = {name: each for name, (each, _) in each_of.items()}
            lines += [line for _, more in each_of.values() for line in more]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            pairs = [without_unknown_keys(inner, each, f"{inside}.{i}") for i, each in enumerate(value)]
            known[key] = [each for each, _ in pairs]
            lines += [line for _, more in pairs for line in more]
        elif get_origin(kind.model_fields[key].annotation) is tuple:
            known[key] = value  # not a sequence: validation reports it
        else:
            known[key], more = without_unknown_keys(inner, value, inside)
            lines += more
    return known, lines


def _with_new_names(kind: type[BaseModel], values: Mapping[Any, Any]) -> dict[Any, Any]:
    """Replaces former names of keys, except where the new name is present too. Python shows each warning once."""
    found = dict(values)
    for old, new in (kind.renamed if issubclass(kind, Config) else {}).items():
        if old in found and new not in found:
            warnings.warn(f"the config key {old!r} is now called {new!r}; rename it", FutureWarning, stacklevel=2)
            found[new] = found.pop(old)
    return found


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Returns the model of `Model`, `Model | None`, `list[Model]` or `dict[str, Model]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for each in get_args(annotation) if (model := _model_in(each))), None)


def _describe_unknown(key: Any, kind: type[BaseModel]) -> str:
    allowed = sorted(kind.model_fields)
    new = kind.renamed.get(key) if issubclass(kind, Config) else None
    near = difflib.get_close_matches(str(key), allowed, n=1) if new is None else [new]
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"unknown key {key!r}{hint}; allowed: {', '.join(allowed)}"


def describe_errors(error: ValidationError) -> str:
    """Returns one line per mistake: `transformer.num_gpus: Input should be greater than or equal to 0, got -1`."""
    return "\n".join(_describe(mistake) for mistake in error.errors())


def _describe(mistake: Any) -> str:
    place = ".".join(str(part) for part in mistake["loc"]) or "config"
    message = " ".join(mistake["msg"].removeprefix("Value error, ").split())
    if mistake["type"] in {"value_error", "missing"}:
        return f"{place}: {message}"
    return f"{place}: {message}, got {mistake['input']!r}"

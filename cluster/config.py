"""The base of every config class: frozen, and strict about keys."""

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator


class Config(BaseModel):
    """A frozen pydantic model that refuses unknown keys by naming the allowed ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        allowed = sorted(cls.model_fields)
        for key in values:
            if key not in cls.model_fields:
                near = difflib.get_close_matches(str(key), allowed, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ValueError(f"unknown key {key!r}{hint}; allowed: {', '.join(allowed)}")
        return values


def describe_errors(error: ValidationError) -> str:
    """One line per mistake: `transformer.num_gpus: Input should be greater than or equal to 0, got -1`."""
    return "\n".join(_describe(mistake) for mistake in error.errors())


def _describe(mistake: Any) -> str:
    place = ".".join(str(part) for part in mistake["loc"]) or "config"
    message = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] in {"value_error", "missing"}:
        return f"{place}: {message}"
    return f"{place}: {message}, got {mistake['input']!r}"

"""Tests of the limit on a request's cost: its error says which field to lower, and how far."""

import re
from typing import Any

import pytest

from serve_app.errors import BadRequest
from serve_app.inputs.cost import check_cost
from tests.serve_app.test_validation import build_validator


def rejection(family: str, limit: float, **fields: Any) -> BadRequest:
    validator = build_validator(family, limits={"max_megapixel_steps": limit})
    with pytest.raises(BadRequest) as refused:
        validator.requests({"prompt": "a cat"} | fields)
    return refused.value


@pytest.mark.parametrize(
    ("family", "limit", "fields", "param"),
    [
        ("flux", 100, {"size": "1024x1024", "num_inference_steps": 20, "n": 10}, "n"),
        ("flux", 10, {"size": "1024x1024", "num_inference_steps": 20, "n": 2}, "num_inference_steps"),
        ("flux", 0.9, {"size": "1024x1024", "num_inference_steps": 20}, "size"),
        ("wan", 200, {"size": "832x480", "num_inference_steps": 20, "num_frames": 81}, "num_frames"),
    ],
)
def test_what_costs_too_much_names_the_field_to_lower(
    family: str, limit: float, fields: dict[str, Any], param: str
) -> None:
    refused = rejection(family, limit, **fields)
    assert refused.param == param
    assert "limits.max_megapixel_steps" in str(refused)
    assert f"is {limit:g}" in str(refused)


def test_what_the_refusal_says_is_taken() -> None:
    fields = {"prompt": "a cat", "size": "1024x1024", "num_inference_steps": 20}
    refused = rejection("flux", 100, **fields, n=10)
    told = re.search(r"ask for (\d+) or less", str(refused))
    assert told is not None
    validator = build_validator("flux", limits={"max_megapixel_steps": 100})
    assert len(validator.requests(fields | {"n": int(told[1])})) == int(told[1])
    with pytest.raises(BadRequest):
        validator.requests(fields | {"n": int(told[1]) + 1})


def test_exactly_the_limit_is_taken() -> None:
    requests = build_validator("flux").requests({"prompt": "a cat", "n": 3})
    check_cost(requests, sum(each.megapixel_steps for each in requests), "mine")
    check_cost(requests, None, "nobody's")


def test_no_config_has_a_default_that_its_own_limit_refuses() -> None:
    """Even the costliest default request is far below the default limit of 20,000 megapixel-steps."""
    [request] = build_validator("wan").requests({"prompt": "waves"})
    assert request.megapixel_steps < 20_000 / 4

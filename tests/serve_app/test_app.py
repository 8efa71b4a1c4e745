"""Tests of the app builder as Serve calls it."""

import pytest
from ray.serve.exceptions import RayServeException

from serve_app.app import build_app


def test_serve_gives_what_the_yaml_says_and_prints_a_line_for_each_mistake() -> None:
    """Serve prints a RayServeException's message alone; for other errors it prints tracebacks and tries again."""
    args = {"model": {"name": "m", "checkpoint": "tiny://flux"}, "encodr": {}, "vae": {"num_gpus": -1}}
    with pytest.raises(RayServeException) as refused:
        build_app(args)
    assert [line.partition(";")[0] for line in str(refused.value).splitlines()] == [
        "ConfigError: config: unknown key 'encodr' (did you mean 'encoder'?)",
        "ConfigError: vae.num_gpus: Input should be greater than or equal to 0, got -1",
    ]
    assert refused.value.__suppress_context__


def test_the_yaml_itself_is_built() -> None:
    assert build_app({"model": {"name": "m", "checkpoint": "tiny://flux"}}) is not None

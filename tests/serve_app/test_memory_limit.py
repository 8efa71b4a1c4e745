"""Tests of memory limits over HTTP: a request that can never fit gets a 400."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from ray import serve

from cluster.replicas.serve_options import plan_serve_options
from deployments.checkpoints.geometry import with_geometry
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.stages.preload import plan_preload
from deployments.transformer import Transformer
from deployments.vae import Vae
from serve_app.config.limits import LimitsConfig
from serve_app.ingress import Ingress
from tests.app import App

DEFAULTS = {"width": 64, "height": 64, "num_inference_steps": 4}
MODEL = with_geometry(
    ModelConfig.model_validate(
        {"name": "tiny-flux", "checkpoint": "tiny://flux", "family": "flux", "defaults": DEFAULTS}
    )
)
TRANSFORMER_GIB = 15.8e6 / 2**30
"""Room for 14.2 MB of weights and two forwards of 64 x 64 (0.66 MB each), not for one of 256 x 256 (2.6 MB)."""
VAE_GIB = 2e6 / 2**30
"""Room for 64 x 64, but not for 128 x 128, which fits the transformer."""


@contextmanager
def ingress_over(flux_app: App, name: str, stages: Sequence[Any]) -> Iterator[App]:
    """Yields an app of its own, with these stages, on the server of `flux_app`."""
    ingress = serve.deployment(serve.ingress()(Ingress)).options(ray_actor_options={"num_cpus": 0})
    handle = serve.run(
        ingress.bind(LimitsConfig(), (MODEL, tuple(stages), ())), name=name, route_prefix=f"/{name}"
    )
    app = App(flux_app.url.rpartition("/")[0], name, handle, MODEL)
    yield app
    app.client.close()
    serve.delete(name)


@pytest.fixture(scope="module")
def app(flux_app: App) -> Iterator[App]:
    """An app with memory limits, over the encoder of `flux_app`."""

    def stage(deployment: type, config: Any) -> Any:
        options = plan_serve_options(config, graceful_shutdown_timeout_s=5.0, preload=plan_preload(MODEL, config))
        return serve.deployment(deployment).options(**options).bind(MODEL, config)

    stages = (
        flux_app.deployment("Encoder"),
        stage(Transformer, TransformerConfig(num_cpus=0.1, memory_limit_gib=TRANSFORMER_GIB, batch_wait_ms=50)),
        stage(Vae, VaeConfig(num_cpus=0.1, memory_limit_gib=VAE_GIB)),
    )
    with ingress_over(flux_app, "tight", stages) as app:
        yield app


@pytest.fixture(scope="module")
def roomy_app(app: App, flux_app: App) -> Iterator[App]:
    """An app with the same transformer and a VAE without a limit."""
    stages = (flux_app.deployment("Encoder"), app.deployment("Transformer"), flux_app.deployment("Vae"))
    with ingress_over(flux_app, "roomy", stages) as roomy:
        yield roomy


def draw(app: App, size: str, seed: int = 0, steps: int = 4) -> Any:
    fields = {"prompt": "a red fox", "size": size, "seed": seed, "num_inference_steps": steps}
    return app.client.post("/v1/images/generations", json=fields)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("serving", "size", "stage"), [("roomy_app", "256x256", "denoise"), ("app", "128x128", "decode")]
)
def test_what_never_fits_a_stage_is_refused_by_the_field_to_change(
    request: pytest.FixtureRequest, serving: str, size: str, stage: str
) -> None:
    answer = draw(request.getfixturevalue(serving), size)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "size", "invalid_value")
    assert f"size: in the {stage} stage" in error["message"]
    assert "memory_limit_gib" in error["message"]


@pytest.mark.slow
def test_what_the_vae_could_never_decode_is_not_denoised_to_the_end(app: App) -> None:
    def num_forwards() -> int:
        stats = app.deployment("Transformer").stats.remote().result()
        return sum(size * number for size, number in stats.queue.batch_sizes.items())

    before, steps = num_forwards(), 100
    assert draw(app, "128x128", steps=steps).status_code == 400
    app.wait_for_seats(0)
    assert num_forwards() - before < steps

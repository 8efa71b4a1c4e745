"""One Ray and one Serve for the whole run; apps are started when a test first asks for one."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from serve_app.ray_environment import RAY_ENVIRONMENT

os.environ.update(RAY_ENVIRONMENT | {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"} | dict(os.environ))

import httpx
import pytest
import ray
import torch
from diffusers import DiffusionPipeline
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import TracingConfig

from deployments.checkpoints.source import fetch_checkpoint, with_family
from deployments.config import ModelConfig
from deployments.families import Family
from serve_app.app import bind_access, build_app, build_ingress, resolve_family
from serve_app.auth.config import AuthConfig, CorsConfig
from serve_app.auth.keys import write_keys
from serve_app.config import AppConfig, IngressConfig, LimitsConfig, parse_app_config
from serve_app.jobs.config import JobsConfig
from tests.keyed_app import ENDLESS, ORIGIN, KeyedApp, make_keys
from tests.pretend_cuda.collect import Groups
from tests.pretend_cuda.items import Pretended
from tests.tiny_models import family_of

torch.set_num_threads(1)
TEXT_TOKENS = 64
"""Of the prompt, here and there: FLUX would pad to 512."""
PATIENCE_S = 60.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thorough",
        action="store_true",
        help="also what takes long: all pairs, all pipelines, faults, nodes that come and go",
    )
    parser.addoption(
        "--no-pretend-gpu", action="store_true", help="what needs a GPU is skipped where there is none"
    )


PRETENDED = Groups()


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run in parallel, all tests of the one Ray cluster go to one process, and those of a file stay together.

    A test that asks for its app by name (`getfixturevalue`) says `usefixtures("ray_cluster")`.
    """
    is_pretended, is_thorough = not config.getoption("--no-pretend-gpu"), config.getoption("--thorough")
    if not is_thorough:
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)
    PRETENDED.take_over(items, is_wanted=is_pretended, is_thorough=is_thorough)
    for item in items:
        if isinstance(item, Pretended):
            continue
        on_cluster = "ray_cluster" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("ray cluster" if on_cluster else item.path.name))


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if not isinstance(item, Pretended):
        return None
    item.tell()
    item.session._setupstate.teardown_exact(nextitem)  # the test before left what this one's folder has in common
    return True


def pytest_sessionfinish() -> None:
    PRETENDED.close()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=16,
        num_gpus=torch.cuda.device_count(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def serve_url(ray_cluster: None) -> Iterator[str]:
    """Serve with HTTP on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tracing = TracingConfig(
        enabled=True, sampling_ratio=0.0
    )  # of a request whose client samples, spans all the same
    serve.start(http_options={"host": "127.0.0.1", "port": port}, tracing_config=tracing)
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


class App:
    """A served tiny checkpoint, and the plain pipeline beside it."""

    def __init__(self, url: str, name: str, handle: DeploymentHandle, model: ModelConfig) -> None:
        self.url, self.name, self.handle = f"{url}/{name}", name, handle
        self.model, self.family = model, model.architecture
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def deployment(self, name: str) -> DeploymentHandle:
        """`_check_exists`: a test may want one that is not there."""
        return serve.get_deployment_handle(name, self.name, _check_exists=False)

    def status(self) -> dict[str, Any]:
        """As of now or later: GET /v1/status may tell what was seen before it was asked."""
        began = time.monotonic()
        while True:
            told: dict[str, Any] = self.client.get("/v1/status").json()
            if told["age_s"] < time.monotonic() - began:
                return told
            time.sleep(0.1)

    def wait_for_seats(self, num_seats: int) -> None:
        """Until so many requests are in the transformer."""
        deadline = time.monotonic() + PATIENCE_S
        while self.deployment("Transformer").stats.remote().result().queue.num_seats != num_seats:
            assert time.monotonic() < deadline, f"there never were {num_seats} requests in the transformer"
            time.sleep(0.02)


@pytest.fixture(scope="session")
def start_app(serve_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., App]]:
    """Starts a tiny checkpoint once for every set of options."""
    apps: list[App] = []
    jobs = tmp_path_factory.mktemp("jobs")

    @cache
    def start(tiny: str, *, shards: int = 1, num_gpus: float = 0, **limits: Any) -> App:
        """num_gpus: of every process."""
        parts = {"gpus": num_gpus} if num_gpus else {}
        name = "-".join([tiny, str(shards), *(f"{k}{v}" for k, v in (parts | limits).items())])
        name = name.replace(".", "_")  # Ray titles a process that is at work by what follows the last dot
        resources = {"num_cpus": 0.1, "num_gpus": num_gpus}
        model = {"name": f"tiny-{tiny}", "checkpoint": f"tiny://{tiny}"}
        of = with_family(ModelConfig.model_validate(model)).architecture
        config = parse_app_config(
            {
                "model": model
                | {
                    "about": "Knows nothing.",
                    "examples": ["a cat", "a dog"],
                    "schedulers": ["DDIMScheduler"] if tiny == "sd15" else [],
                    "defaults": {"width": 64, "height": 64, "num_inference_steps": 4}
                    | ({"num_frames": 5} if of.media == "video" else {}),
                },
                "encoder": resources | _text_tokens(of),
                "transformer": resources | {"shards": shards},
                "vae": resources,
                "ingress": {"num_replicas": 1},
                "jobs": {"database": f"sqlite:///{jobs / name}.db"},
                "limits": {"max_pixels": 512 * 512, "max_num_inference_steps": 50, "max_num_frames": 33} | limits,
            }
        )
        config = resolve_family(config)
        handle = serve.run(build_app(config), name=name, route_prefix=f"/{name}")
        apps.append(App(serve_url, name, handle, config.served[0].model))
        return apps[-1]

    yield start
    for app in apps:
        app.client.close()


@pytest.fixture(scope="session")
def flux_app(start_app: Callable[..., App]) -> App:
    return start_app("flux")


@pytest.fixture(scope="session")
def start_ingress(flux_app: App, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., App]]:
    """Starts one more ingress, with limits of its own, over the stages of `flux_app`: seconds, not a minute."""
    apps: list[App] = []

    def start(
        name: str,
        *,
        family: str = "flux",
        stages_of: App = flux_app,
        vae: str | Application = "Vae",
        num_replicas: int = 1,
        auth: AuthConfig | None = None,
        cors: CorsConfig | None = None,
        jobs: JobsConfig | None = None,
        **limits: Any,
    ) -> App:
        model = ModelConfig.model_validate(
            {
                "name": f"tiny-{family}",
                "checkpoint": f"tiny://{family}",
                "defaults": {"width": 64, "height": 64, "num_inference_steps": 4},
            }
        )
        stages = [
            stages_of.deployment(stage) if isinstance(stage, str) else stage
            for stage in ("Encoder", "Transformer", vae)
        ]
        config = resolve_family(
            AppConfig(
                model=model,
                limits=LimitsConfig(**limits),
                ingress=IngressConfig(num_replicas=num_replicas),
                auth=auth,
                cors=cors,
            )
        )
        own_jobs = JobsConfig(database=f"sqlite:///{tmp_path_factory.mktemp('jobs')}/jobs.db")
        told = (config.served[0].model, tuple(stages), ())
        app = build_ingress(config).bind(config.limits, told, jobs=jobs or own_jobs, **bind_access(config))
        handle = serve.run(app, name=name, route_prefix=f"/{name}")
        apps.append(App(flux_app.url.rpartition("/")[0], name, handle, config.served[0].model))
        return apps[-1]

    yield start
    for app in apps:
        app.client.close()


@pytest.fixture(scope="session")
def patient_app(start_ingress: Callable[..., App]) -> App:
    """Takes requests of so many steps that none ends within a test."""
    return start_ingress("patient", max_num_inference_steps=ENDLESS)


@pytest.fixture(scope="session")
def narrow_app(start_ingress: Callable[..., App]) -> App:
    """Takes one request at a time."""
    return start_ingress("narrow", max_concurrent_requests=1, max_num_inference_steps=ENDLESS)


@pytest.fixture(scope="session")
def hasty_app(start_ingress: Callable[..., App]) -> App:
    """Waits for a second."""
    return start_ingress("hasty", request_timeout_s=1.0, max_num_inference_steps=ENDLESS)


@pytest.fixture(scope="session")
def keyed_app(start_ingress: Callable[..., App], tmp_path_factory: pytest.TempPathFactory) -> KeyedApp:
    """Asks for keys."""
    file, (secrets, keys) = tmp_path_factory.mktemp("keys") / "keys.yaml", make_keys()
    write_keys(file, keys)
    auth, cors = AuthConfig(keys_file=str(file)), CorsConfig(origins=(ORIGIN,))
    limits = {"max_num_inference_steps": ENDLESS, "request_timeout_s": 10.0}
    app = start_ingress("keyed", num_replicas=2, auth=auth, cors=cors, **limits)
    return KeyedApp(app, file, secrets)


@pytest.fixture(scope="session")
def crossed_app(start_ingress: Callable[..., App]) -> App:
    """Requests of one family go through stages of another, which makes another size of some."""
    return start_ingress("crossed", family="sd15")


@pytest.fixture(scope="session")
def sd15_app(start_app: Callable[..., App]) -> App:
    return start_app("sd15")


@pytest.fixture(scope="session")
def wan_app(start_app: Callable[..., App]) -> App:
    return start_app("wan")


Plain = Callable[..., Any]


@pytest.fixture(scope="session")
def plain_pipeline() -> Callable[[str], Any]:
    """The whole tiny checkpoint of a family in one plain diffusers pipeline, float32."""
    return cache(_load_plain)


@pytest.fixture(scope="session")
def plain(plain_pipeline: Callable[[str], Any]) -> Plain:
    """`plain(family, prompt, seed=…, **settings)`: what diffusers' own pipeline draws."""

    def draw(family: str, prompt: str, *, seed: int, output_type: str = "pil", **settings: Any) -> Any:
        defaults: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 4}
        if family_of(family).media == "video":
            defaults["num_frames"] = 5
        pipe = plain_pipeline(family)
        with decoded_by(pipe) as decoded:
            output = pipe(
                prompt,
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="np" if output_type == "latent" else output_type,
                return_dict=False,
                **defaults | _text_tokens(family_of(family)) | settings,
            )[0]
        return decoded[0] if output_type == "latent" else output[0]

    return draw


@contextmanager
def decoded_by(pipe: Any) -> Iterator[list[torch.Tensor]]:
    """The latents that a pipeline passes to `vae.decode` meanwhile: what crosses to the decode stage."""
    decoded: list[torch.Tensor] = []
    decode = pipe.vae.decode

    def noting(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        decoded.append(latents)
        return decode(latents, *args, **kwargs)

    pipe.vae.decode = noting
    yield decoded
    del pipe.vae.decode


def _load_plain(family: str) -> Any:
    pipe = DiffusionPipeline.from_pretrained(fetch_checkpoint(f"tiny://{family}", ()))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _text_tokens(family: Family) -> dict[str, int]:
    return {} if family.max_sequence_length is None else {"max_sequence_length": TEXT_TOKENS}

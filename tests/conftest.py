"""One Ray and one Serve for each process of the run; apps start when a test first needs them."""

import os
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from serve_app.commands.ray_environment import RAY_ENVIRONMENT

# Makes MKL's sums independent of memory alignment; else results computed twice may differ in some bits.
os.environ.update(
    RAY_ENVIRONMENT | {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "MKL_CBWR": "AUTO"} | dict(os.environ)
)

import pytest
import ray
import torch
from diffusers import DiffusionPipeline
from ray import serve
from ray.serve import Application
from ray.serve.schema import TracingConfig

from deployments.checkpoints.source import fetch_checkpoint, with_family
from deployments.config.model import ModelConfig
from deployments.families import Family
from serve_app.app import bind_access, build_app, build_ingress, resolve_family
from serve_app.auth.config import AuthConfig, CorsConfig
from serve_app.auth.keys import write_keys
from serve_app.config.app import AppConfig, IngressConfig
from serve_app.config.limits import LimitsConfig
from serve_app.config.serve_file import parse_app_config
from serve_app.jobs.config import JobsConfig
from tests.app import App
from tests.keyed_app import ENDLESS, FOREVER_S, ORIGIN, KeyedApp, make_keys
from tests.lifetimes import Lifetimes, fixtures_of
from tests.pretend_cuda.collect import Groups
from tests.pretend_cuda.items import Pretended
from tests.quick import is_quick, is_quick_file
from tests.tiny_models import family_of

torch.set_num_threads(1)
TEXT_TOKENS = 64
"""Tokens of a prompt, in apps and in plain pipelines: FLUX would pad to 512."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thorough",
        action="store_true",
        help="also what takes long: all pairs, all pipelines, faults, nodes that come and go",
    )
    parser.addoption("--quick", action="store_true", help="only what needs no torch, no Ray and no browser")
    parser.addoption(
        "--no-pretend-gpu", action="store_true", help="what needs a GPU is skipped where there is none"
    )


PRETENDED = Groups()
LIFETIMES = Lifetimes()
CLUSTER = ExitStack()
"""Ends Ray and Serve of this process."""
SHARED_APPS = {f"{name}_app" for name in ("flux", "sd15", "wan", "patient", "narrow", "hasty", "keyed", "crossed")}
"""Fixtures of apps that several files use."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_file = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if config.getoption("--quick") and is_file and not is_quick_file(collection_path) else None


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Orders and groups the tests.

    In a parallel run, tests that need a Ray cluster go to two processes with a cluster each: one for files that
    use an app of several files, one for all others. The other tests stay grouped by file. Tests that need a
    cluster come first in a parallel run, because they mostly wait while the other processes work; in a single
    process they come last, because a running Ray takes part of the cores. Files that share the most apps come
    first, so that these apps can end.

    A test that requests its app by name (`getfixturevalue`) must have `usefixtures("ray_cluster")`.
    """
    is_pretended, is_thorough = not config.getoption("--no-pretend-gpu"), config.getoption("--thorough")
    if not is_thorough:
        leave_out(config, items, lambda item: item.get_closest_marker("thorough") is not None)
    if config.getoption("--quick"):
        leave_out(config, items, lambda item: not is_quick(item))
    PRETENDED.take_over(items, is_wanted=is_pretended, is_thorough=is_thorough)
    apps_of: dict[Path, set[str]] = defaultdict(set)
    for item in items:
        apps_of[item.path] |= SHARED_APPS & fixtures_of(item)

    def place(item: pytest.Item) -> tuple[bool, bool, bool, int]:
        shares_apps = bool(apps_of[item.path])
        is_first = is_on_cluster(item) == hasattr(config, "workerinput")  # workerinput: one of several processes
        return not is_first, not isinstance(item, Pretended), not shares_apps, -len(apps_of[item.path])

    items.sort(key=place)
    LIFETIMES.note(items)
    for item in items:
        if isinstance(item, Pretended):
            continue
        group = item.path.name
        if is_on_cluster(item):
            group = f"ray cluster, {'shared apps' if apps_of[item.path] else 'others'}"
        item.add_marker(pytest.mark.xdist_group(group))


def leave_out(config: pytest.Config, items: list[pytest.Item], is_out: Callable[[pytest.Item], bool]) -> None:
    left_out = [item for item in items if is_out(item)]
    items[:] = [item for item in items if not is_out(item)]
    config.hook.pytest_deselected(items=left_out)


def is_on_cluster(item: pytest.Item) -> bool:
    return "ray_cluster" in getattr(item, "fixturenames", ())


def pytest_runtest_setup(item: pytest.Item) -> None:
    LIFETIMES.begin(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    yield
    LIFETIMES.end(item)
    if is_on_cluster(item) and nextitem is not None and not is_on_cluster(nextitem):
        CLUSTER.close()  # no later test needs it, and an idle cluster takes a tenth of a core


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if not isinstance(item, Pretended):
        return None
    item.tell()
    item.session._setupstate.teardown_exact(nextitem)  # the previous test left the fixtures of its folder
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
    CLUSTER.callback(ray.shutdown)
    yield
    CLUSTER.close()


@pytest.fixture(scope="session")
def serve_url(ray_cluster: None) -> str:
    """Serve with HTTP on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tracing = TracingConfig(
        enabled=True, sampling_ratio=0.0
    )  # requests whose client samples get spans nevertheless
    serve.start(http_options={"host": "127.0.0.1", "port": port}, tracing_config=tracing)
    CLUSTER.callback(serve.shutdown)
    return f"http://127.0.0.1:{port}"


@pytest.fixture(scope="session")
def start_app(serve_url: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., App]:
    """Starts a tiny checkpoint once for every set of options; it ends with its owner (lifetimes.py)."""
    jobs = tmp_path_factory.mktemp("jobs")

    def start(tiny: str, *, shards: int = 1, num_gpus: float = 0, owner: str | None = None, **limits: Any) -> App:
        """num_gpus: of every process."""
        parts = {"gpus": num_gpus} if num_gpus else {}
        name = "-".join([tiny, str(shards), *(f"{k}{v}" for k, v in (parts | limits).items())])
        name = name.replace(".", "_")  # Ray names a working process by what follows the last dot
        if known := LIFETIMES.known(name):
            return known
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
                "transformer": resources | {"shards": shards, "max_waiting_requests": 4},
                "vae": resources,
                "ingress": {"num_replicas": 1},
                "jobs": {"database": f"sqlite:///{jobs / name}.db"},
                "limits": {"max_pixels": 512 * 512, "max_num_inference_steps": 50, "max_num_frames": 33} | limits,
            }
        )
        config = resolve_family(config)
        handle = serve.run(build_app(config), name=name, route_prefix=f"/{name}")
        return LIFETIMES.add(App(serve_url, name, handle, config.served[0].model), owner, name)

    return start


@pytest.fixture(scope="session")
def flux_app(start_app: Callable[..., App]) -> App:
    return start_app("flux", owner="flux_app")


@pytest.fixture(scope="session")
def start_ingress(flux_app: App, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., App]:
    """Starts another ingress, with its own limits, over the stages of `flux_app`: takes seconds instead of a
    minute. It ends with its owner (lifetimes.py)."""

    def start(
        name: str,
        *,
        family: str = "flux",
        stages_of: App = flux_app,
        vae: str | Application = "Vae",
        transformer: str | Application = "Transformer",
        num_replicas: int = 1,
        auth: AuthConfig | None = None,
        cors: CorsConfig | None = None,
        jobs: JobsConfig | None = None,
        owner: str | None = None,
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
            for stage in ("Encoder", transformer, vae)
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
        return LIFETIMES.add(App(flux_app.url.rpartition("/")[0], name, handle, config.served[0].model), owner)

    return start


@pytest.fixture(scope="session")
def patient_app(start_ingress: Callable[..., App]) -> App:
    """An app that accepts requests with so many steps that none ends within a test."""
    return start_ingress(
        "patient",
        owner="patient_app",
        max_num_inference_steps=ENDLESS,
        request_timeout_s=FOREVER_S,
        max_megapixel_steps=1e6,
    )


@pytest.fixture(scope="session")
def narrow_app(start_ingress: Callable[..., App]) -> App:
    """An app that accepts one request at a time."""
    return start_ingress(
        "narrow",
        owner="narrow_app",
        max_concurrent_requests=1,
        max_num_inference_steps=ENDLESS,
        request_timeout_s=FOREVER_S,
    )


@pytest.fixture(scope="session")
def hasty_app(start_ingress: Callable[..., App]) -> App:
    """An app with a timeout of one second."""
    return start_ingress("hasty", owner="hasty_app", request_timeout_s=1.0, max_num_inference_steps=ENDLESS)


@pytest.fixture(scope="session")
def keyed_app(start_ingress: Callable[..., App], tmp_path_factory: pytest.TempPathFactory) -> KeyedApp:
    """An app that requires keys."""
    file, (secrets, keys) = tmp_path_factory.mktemp("keys") / "keys.yaml", make_keys()
    write_keys(file, keys)
    auth, cors = AuthConfig(keys_file=str(file)), CorsConfig(origins=(ORIGIN,))
    limits = {"max_num_inference_steps": ENDLESS, "request_timeout_s": FOREVER_S}
    jobs = JobsConfig(database=f"sqlite:///{file.parent}/jobs.db", timeout_s=8.0)
    app = start_ingress("keyed", owner="keyed_app", num_replicas=2, auth=auth, cors=cors, jobs=jobs, **limits)
    return KeyedApp(app, file, secrets)


@pytest.fixture(scope="session")
def crossed_app(start_ingress: Callable[..., App]) -> App:
    """An app whose stages are of another family than its requests, and return another size for some."""
    return start_ingress("crossed", owner="crossed_app", family="sd15")


@pytest.fixture(scope="session")
def sd15_app(start_app: Callable[..., App]) -> App:
    return start_app("sd15", owner="sd15_app")


@pytest.fixture(scope="session")
def wan_app(start_app: Callable[..., App]) -> App:
    return start_app("wan", owner="wan_app")


Plain = Callable[..., Any]


@pytest.fixture(scope="session")
def plain_pipeline() -> Callable[[str], Any]:
    """The whole tiny checkpoint of a family in one plain diffusers pipeline, float32."""
    return cache(_load_plain)


@pytest.fixture(scope="session")
def plain(plain_pipeline: Callable[[str], Any]) -> Plain:
    """`plain(family, prompt, seed=…, **settings)`: returns what diffusers' own pipeline draws."""

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
    """Yields the list of latents that the pipeline passes to `vae.decode` meanwhile: the decode stage's input."""
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

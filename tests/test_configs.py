"""Every YAML in configs/ is parsed, and planned for the GPUs it names; the local ones are run by `serve run`."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from cluster.machines.inventory import parse_gpus
from deployments.checkpoints.geometry import with_geometry
from deployments.checkpoints.source import with_family
from deployments.plan.describe import Description
from deployments.plan.place import plan_placement
from deployments.plan.plan import StageConfigs, demands_of
from deployments.plan.several import ModelDemands, place_beside
from deployments.plan.sizes import default_size
from serve_app.app import build_validator
from serve_app.commands.config_docs import render_config_docs
from serve_app.config.app import ConfigError
from serve_app.config.checkpoint_files import shared_stages
from serve_app.config.serve_file import load_app_config, parse_app_config, read_serve_file
from tests.relay_server import left_over
from tests.thorough import usually

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
LOCAL = [path for path in CONFIGS if re.search("(tiny|embedded)://", path.read_text())]
README = (ROOT / "README.md").read_text()
PUBLISHED = ROOT / "tests" / "data" / "published"
FOLDERS = {
    **{
        name: name
        for name in ("flux_kontext_dev", "flux_fill_dev", "qwen_image_edit_2509", "chroma", "sd35_large")
    },
    "z_image_turbo": "z_image_turbo",
    "flux_dev": "flux_dev",
    "flux2_klein_4b": "flux2_klein_4b",
    "flux2_dev": "flux2_dev",
    "flux_schnell": "flux_schnell",
    "sd15": "sd15",
    "sdxl": "sdxl",
    "sd3_medium": "sd3_medium",
    "qwen_image": "qwen_image",
    "wan_t2v_1_3b": "wan_2_1_1_3b",
    "wan_t2v_14b": "wan_2_1_14b",
    "wan22_t2v_a14b": "wan_2_2_a14b",
    "hunyuan_video15": "hunyuan_video15",
    "ltx2": "ltx_2",
}
MODEL = {"name": "m", "checkpoint": "tiny://flux"}
QUICK = {"flux_dev_2x16gb.yaml", "sdxl.yaml", "qwen_image_24gb.yaml", "wan22_t2v_a14b_24gb.yaml"}
"""Configs tested without --thorough, because a plan takes seconds."""


def test_every_config_is_parsed_and_planned_without_network_and_weights() -> None:
    """Runs in a separate process without Ray, which refuses connections and reports what was imported.

    Configs of hub models name their family, or leave it to the checkpoint, which is not here.
    """
    program = """
import sys
from pathlib import Path
import yaml
from ray.serve.schema import ServeDeploySchema
from serve_app.app import build_app, build_validator
from serve_app.config.serve_file import load_app_config
from tests.relay_server import left_over

def refuse(event, _):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise ConnectionRefusedError(event)

sys.addaudithook(refuse)
for path in Path("configs").glob("*.yaml"):
    ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    config = load_app_config(path)
    models = [served.model for served in config.served]
    if any(model.family is None and "://" not in model.checkpoint for model in models):
        continue
    build_app(config)
    assert build_validator(config).requests({"prompt": "a cat"}), path
print([name for name in ("torch", "diffusers", "transformers") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, "[]"), run.stderr


def gpu_configs() -> list[tuple[str, str]]:
    """Returns (file, GPUs) of README's table."""
    rows = re.findall(r"^\| \[(\w+\.yaml)\].*\| (one|two) GPUs? of (.*) GB.*\|$", README, re.MULTILINE)
    found = []
    for name, count, sizes in rows:
        cards = re.findall(r"\d+", sizes)
        cards = cards if count == "one" or len(cards) == 2 else cards * 2
        found.append((name, "+".join(f"1x{size}GiB" for size in cards)))
    return found


def test_every_config_is_in_the_readme() -> None:
    assert {name for name, _ in gpu_configs()} == {path.name for path in CONFIGS if path not in LOCAL}


@pytest.mark.parametrize(("name", "gpus"), usually(gpu_configs(), lambda row: row[0] in QUICK))
def test_a_gpu_config_fits_the_cards_it_is_for(name: str, gpus: str) -> None:
    """Includes a request with the default settings. Uses the published architecture."""
    config = load_app_config(ROOT / "configs" / name)
    demands = []
    for served in config.served:
        key = name if config.is_one else served.name.replace("-", "_")
        folder = PUBLISHED / next(folder for of, folder in FOLDERS.items() if key.startswith(of))
        local = served.model
        if local.family is None:
            local = local.model_copy(update={"checkpoint": str(folder)})
        model = with_geometry(with_family(local))
        stages = StageConfigs(served.encoder, served.transformer, served.vae)
        sizes = Description(model, folder).sizes(*stages.by_stage().values(), (default_size(model),))
        demands.append(ModelDemands(served.name, stages, sizes, shared_stages(served)))
    beside = place_beside(demands, parse_gpus(gpus))
    for of in demands:
        demands = {stage: d for stage, d in demands_of(of.stages, of.sizes).items() if stage not in of.shared}
        assert not plan_placement(demands, parse_gpus(gpus), beside=beside[of.name]).shortfalls()


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", usually(LOCAL, lambda path: path.stem == "quickstart"), ids=lambda path: path.stem
)
def test_a_config_without_downloads_runs_by_serve_run_and_ends_without_a_trace(path: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tmp_path / "config.yaml"
    config.write_text(path.read_text().replace("port: 8000", f"port: {port}"))
    log = (tmp_path / "log").open("wb")
    command = [str(Path(sys.executable).with_name("serve")), "run", str(config)]
    process = subprocess.Popen(
        command, stdout=log, stderr=log, cwd=ROOT, env=os.environ | {"RAY_ADDRESS": "local"}
    )
    children: list[psutil.Process] = []
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for_200(f"{url}/health", process)
        makes_videos = build_validator(load_app_config(path)).family.media == "video"
        kind = "videos/sync" if makes_videos else "images/generations"
        answer = httpx.post(f"{url}/v1/{kind}", json={"prompt": "a cat", "seed": 1}, timeout=60)
        assert answer.status_code == 200
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        log.close()
    assert children
    assert left_over(children) == []


def wait_for_200(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    pytest.fail(f"{url} never said 200")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            {"encodr": {}},
            "unknown key 'encodr' (did you mean 'encoder'?); allowed: auth, cors, encoder, ingress, jobs, limits",
        ),
        ({"transformer": {"num_gpu": 1}}, "transformer: unknown key 'num_gpu' (did you mean 'num_gpus'?)"),
        (
            {"vae": {"dtype": "float8"}},
            "vae.dtype: Input should be 'float32', 'bfloat16' or 'float16', got",
        ),
        ({"vae": {"num_gpus": -1}}, "vae.num_gpus: Input should be greater than or equal to 0, got -1"),
        ({"vae": {"num_gpus": 1.5}}, "num_gpus must be a fraction up to 1 or a whole number"),
        ({"vae": {"device": "cuda"}}, "device 'gpu' needs num_gpus > 0"),
        ({"encoder": {"min_replicas": 3}}, "max_replicas must be at least min_replicas (3), got 1"),
        ({"model": MODEL | {"family": "flx"}}, "model.family: unknown family 'flx'; allowed: flux, sd15"),
        ({"transformer": {"cuts": [5, 3]}}, "cuts must be ascending block numbers from 1, got [5, 3]"),
        ({"transformer": {"shards": 3, "cuts": [4]}}, "1 cuts make 2 shards, got shards: 3"),
        ({"transformer": {"max_memory": {"0": "14GiB"}}}, "max_memory needs device_map"),
        (
            {"transformer": {"context_parallel": 2, "num_gpus": 0.5}},
            "ranks that share each forward need a GPU each, but num_gpus: 0.5 shares one",
        ),
    ],
)
def test_a_wrong_config_is_refused_by_key(args: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_app_config({"model": MODEL} | args)
    assert message in str(refused.value)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        parse_app_config({"model": MODEL, "vae": {"dtype": "x"}, "encoder": {"device": "tpu"}})
    assert "vae.dtype" in str(refused.value)
    assert "encoder.device" in str(refused.value)


def test_what_is_merged_into_a_mapping_may_be_said_anew_in_it(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: &a {k: 1}\nz: [[{b: &b {<<: *a, k: 2}}]]\nc: {<<: *b, k: 3}\n")
    assert read_serve_file(tmp_path / "x.yaml")["c"] == {"k": 3}


def test_a_file_without_an_application_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("applications: [{import_path: 'other:app'}]")
    with pytest.raises(
        ConfigError, match=r"x\.yaml: one application must have import_path: serve_app\.app:build_app, got none"
    ):
        load_app_config(tmp_path / "x.yaml")


def test_of_several_applications_the_one_that_serves_a_checkpoint_is_meant(tmp_path: Path) -> None:
    ours = {"name": "relay", "import_path": "serve_app.app:build_app", "args": {"model": MODEL}}
    other = {"name": "shop", "import_path": "shop:app"}
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump({"applications": [other, ours]}))
    assert load_app_config(path).served[0].model.checkpoint == MODEL["checkpoint"]
    path.write_text(yaml.safe_dump({"applications": [ours, ours | {"name": "second"}]}))
    with pytest.raises(ConfigError, match="got relay, second; write the one to use into a file of its own"):
        load_app_config(path)


def test_the_config_reference_is_current() -> None:
    """Update it by `relay config > docs/config.md`."""
    assert (ROOT / "docs" / "config.md").read_text() == render_config_docs()

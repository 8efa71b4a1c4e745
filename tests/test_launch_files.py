"""The files in cluster/launch: Ray's own parsers accept them, and their nodes have room for the app that they
start."""

import copy
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from ray._private import ray_constants
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.resource_demand_scheduler import get_bin_pack_residual
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from cluster.replicas.serve_options import plan_serve_options
from deployments.config.stage import StageConfig
from serve_app.commands.ray_environment import RAY_ENVIRONMENT
from serve_app.config.app import AppConfig
from serve_app.config.serve_file import load_app_config, parse_app_config
from serve_app.config.shipped import find_config

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "cluster" / "launch"
DRAIN_TIMEOUT = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
[RAY_VERSION] = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)

# https://github.com/ray-project/kuberay/blob/master/docs/reference/api.md; `labels`: KubeRay 1.5
RAY_SERVICE_SPEC = {
    "serveConfigV2",
    "rayClusterConfig",
    "serveService",
    "upgradeStrategy",
    "excludeHeadPodFromServeSvc",
}
RAY_CLUSTER_SPEC = {
    *("suspend", "managedBy", "autoscalerOptions", "headServiceAnnotations", "enableInTreeAutoscaling"),
    *("gcsFaultToleranceOptions", "headGroupSpec", "rayVersion", "workerGroupSpecs", "authOptions"),
}
AUTOSCALER_OPTIONS = {
    *("resources", "image", "imagePullPolicy", "securityContext", "idleTimeoutSeconds", "upscalingMode"),
    *("version", "env", "envFrom", "volumeMounts"),
}
HEAD_GROUP_SPEC = {
    "template",
    "headService",
    "enableIngress",
    "rayStartParams",
    "serviceType",
    "labels",
    "resources",
}
WORKER_GROUP_SPEC = {
    *("suspend", "groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds"),
    *("rayStartParams", "template", "scaleStrategy", "numOfHosts", "labels", "resources"),
}
POD_SPEC = {
    *("containers", "initContainers", "tolerations", "volumes", "securityContext", "restartPolicy"),
    "terminationGracePeriodSeconds",
}
CONTAINER = {"name", "image", "command", "ports", "resources", "volumeMounts", "env", "envFrom"}
"""Fields of Kubernetes' PodSpec and Container that are used here."""
COMPOSED = {
    *("image", "build", "command", "environment", "init", "shm_size", "ports", "volumes", "stop_grace_period"),
    *("profiles", "deploy"),
}
"""Fields of https://github.com/compose-spec/compose-spec/blob/main/05-services.md that are used here."""


@dataclass(frozen=True)
class NodeType:
    """Nodes of one kind: their initial and maximum number, and what each node offers."""

    min_nodes: int
    max_nodes: int
    resources: dict[str, float]
    labels: dict[str, str]


def node_types(autoscaler_config: dict[str, Any]) -> list[NodeType]:
    """Returns the types of worker nodes; the head must offer stages no CPUs."""
    types = dict(autoscaler_config["available_node_types"])
    head = types.pop(autoscaler_config["head_node_type"])
    assert head["resources"]["CPU"] == 0
    return [
        NodeType(kind["min_workers"], kind["max_workers"], kind["resources"], kind.get("labels", {}))
        for kind in types.values()
    ]


def launcher_config() -> dict[str, Any]:
    config: dict[str, Any] = prepare_config(yaml.safe_load((LAUNCH / "cluster.yaml").read_text()))
    return config


def ray_service() -> dict[str, Any]:
    volume, service = yaml.safe_load_all((LAUNCH / "rayservice.yaml").read_text())
    assert (volume["kind"], service["kind"]) == ("PersistentVolumeClaim", "RayService")
    found: dict[str, Any] = service
    return found


def kubernetes_config() -> dict[str, Any]:
    """Returns the RayService's cluster as Ray's autoscaler reads it, which checks fields, quantities and
    labels."""
    cluster = {"metadata": {"name": "c", "namespace": "n"}, "spec": ray_service()["spec"]["rayClusterConfig"]}
    config: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(cluster)
    return config


def kubernetes_app() -> AppConfig:
    serve_config = yaml.safe_load(ray_service()["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(serve_config)
    return parse_app_config(serve_config["applications"][0]["args"])


def launcher_app() -> AppConfig:
    """Returns the config that the comment at the top of cluster.yaml says to deploy."""
    [path] = re.findall(r"serve deploy latent-relay/(\S+\.yaml)", (LAUNCH / "cluster.yaml").read_text())
    return load_app_config(ROOT / path)


def unplaced(app: AppConfig, types: Sequence[NodeType], *, nodes: str, replicas: str) -> list[dict[str, float]]:
    """Returns what finds no room, by Ray's own bin packing, on that many nodes of every type.

    Every node has one GPU, so what fits the node fits a GPU.
    """
    assert all(kind.resources["GPU"] == 1 for kind in types)
    offers = [copy.copy(kind.resources) for kind in types for _ in range(getattr(kind, nodes))]
    labels = [kind.labels for kind in types for _ in range(getattr(kind, nodes))]
    left_over: list[dict[str, float]] = []
    [served] = app.served
    for stage in (served.transformer, served.encoder, served.vae):
        here = [i for i, of in enumerate(labels) if stage.label_selector.items() <= of.items()]
        is_bounded = replicas == "most" and not stage.is_auto  # otherwise it takes only what there is room for
        num_replicas = stage.most_replicas if is_bounded else stage.min_replicas
        left, offered = get_bin_pack_residual([offers[i] for i in here], bundles(stage) * num_replicas)
        left_over += left
        for i, offer in zip(here, offered, strict=True):
            offers[i] = offer
    return left_over


def bundles(stage: StageConfig) -> list[dict[str, float]]:
    """Returns the resources of one replica, as the app will request them."""
    options = plan_serve_options(stage, graceful_shutdown_timeout_s=0, num_shards=stage.num_ranks)
    actor = options["ray_actor_options"]
    found: list[dict[str, float]] = options.get(
        "placement_group_bundles", [{"CPU": actor["num_cpus"], "GPU": actor["num_gpus"]}]
    )
    return found


CLUSTERS = {
    "cluster.yaml": (launcher_app, launcher_config),
    "rayservice.yaml": (kubernetes_app, kubernetes_config),
}


@pytest.mark.parametrize("file", CLUSTERS)
def test_the_app_fits_the_nodes_that_are_there_at_first(file: str) -> None:
    app, config = CLUSTERS[file]
    assert unplaced(app(), node_types(config()), nodes="min_nodes", replicas="least") == []


@pytest.mark.parametrize("file", CLUSTERS)
def test_the_app_fits_the_largest_cluster_when_it_has_scaled_up(file: str) -> None:
    app, config = CLUSTERS[file]
    assert unplaced(app(), node_types(config()), nodes="max_nodes", replicas="most") == []


@pytest.mark.parametrize("file", CLUSTERS)
def test_a_cluster_without_one_of_its_nodes_would_be_too_small(file: str) -> None:
    app, config = CLUSTERS[file]
    first, *others = node_types(config())
    smaller = NodeType(first.min_nodes - 1, first.max_nodes, first.resources, first.labels)
    assert unplaced(app(), [smaller, *others], nodes="min_nodes", replicas="least") != []


def test_ray_takes_the_launchers_file() -> None:
    validate_config(launcher_config())


def test_the_ray_service_has_documented_fields_only() -> None:
    service = ray_service()
    assert service["apiVersion"] == "ray.io/v1"
    assert service["spec"].keys() <= RAY_SERVICE_SPEC
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster.keys() <= RAY_CLUSTER_SPEC
    assert cluster["autoscalerOptions"].keys() <= AUTOSCALER_OPTIONS
    assert cluster["headGroupSpec"].keys() <= HEAD_GROUP_SPEC
    for group in cluster["workerGroupSpecs"]:
        assert group.keys() <= WORKER_GROUP_SPEC
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod.keys() <= POD_SPEC
        assert all(container.keys() <= CONTAINER for container in (*pod["containers"], *pod["initContainers"]))
        mounted = {mount["name"] for mount in pod["containers"][0].get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in pod.get("volumes", [])}


def pods() -> list[dict[str, Any]]:
    cluster = ray_service()["spec"]["rayClusterConfig"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_a_pod_lives_until_ray_has_drained_it() -> None:
    assert float(getattr(ray_constants, DRAIN_TIMEOUT)) > 0  # Ray knows the variable, and drains on SIGTERM
    for pod in pods():
        env = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
        assert pod["terminationGracePeriodSeconds"] > float(env[DRAIN_TIMEOUT])


TOKEN_AND_TLS = {"RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"}


def test_every_process_of_the_ray_service_has_token_and_tls() -> None:
    cluster = ray_service()["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    for holder in (cluster["autoscalerOptions"], *(pod["containers"][0] for pod in pods())):
        env = {each["name"]: each.get("value", "") for each in holder["env"]}
        mounted = {mount["mountPath"] for mount in holder["volumeMounts"]}
        assert env.keys() >= TOKEN_AND_TLS
        assert {str(Path(env[name]).parent) for name in TOKEN_AND_TLS - {"RAY_USE_TLS"}} <= mounted
    for pod in pods():
        [init] = pod["initContainers"]
        assert (ROOT / shlex.split(init["command"][-1])[0]).exists()


@pytest.mark.parametrize("start", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_the_launchers_ray_starts_with_token_and_tls(start: str, tmp_path: Path) -> None:
    """Runs the set-up commands with a temporary home; the commands that start Ray read what these write."""
    authority = tmp_path / ".relay"
    make_authority(authority)
    (tmp_path / "latent-relay").symlink_to(ROOT)
    config = launcher_config()
    for command in config[start.replace("start_ray", "setup")]:
        if ".relay" in command:
            subprocess.run(
                ["bash", "-ec", command], cwd=tmp_path, env=os.environ | {"HOME": str(tmp_path)}, check=True
            )
    found = (authority / "environment").read_text()
    assert {name.partition("=")[0] for name in found.replace("export ", "").split()} >= TOKEN_AND_TLS | {
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN_PATH",
    }
    assert all(Path(path).exists() for path in re.findall(r"=(/\S+(?:crt|key))$", found, re.MULTILINE))
    assert config[start][-1].startswith(". ~/.relay/environment;")


def make_authority(folder: Path) -> None:
    folder.mkdir()
    command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=relay -keyout ca.key -out ca.crt"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)


def test_a_nodes_certificate_is_signed_and_names_the_node(tmp_path: Path) -> None:
    make_authority(tmp_path / "authority")
    script = [str(LAUNCH / "certificate.sh"), "authority", "out", "*.default.svc.cluster.local"]
    subprocess.run(script, cwd=tmp_path, check=True, capture_output=True)
    for host in ("localhost", "relay-head-svc.default.svc.cluster.local"):
        verify = f"openssl verify -CAfile authority/ca.crt -verify_hostname {host} out/tls.crt"
        assert subprocess.run(verify.split(), cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert (tmp_path / "out" / "tls.key").stat().st_mode & 0o077 == 0


def test_every_pod_may_have_a_token_and_may_write_to_its_volume() -> None:
    for pod in pods():
        assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "huggingface", "optional": True}}]
        claims = [volume for volume in pod.get("volumes", []) if "persistentVolumeClaim" in volume]
        assert pod.get("securityContext") == ({"fsGroup": 100} if claims else None)


def test_every_worker_pod_has_a_limit_of_gpus_equal_to_its_request() -> None:
    for group in ray_service()["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        resources = group["template"]["spec"]["containers"][0]["resources"]
        assert resources["limits"] == resources["requests"]
        assert resources["limits"]["nvidia.com/gpu"] == "1"


def test_every_stage_selects_a_group_and_every_group_is_selected() -> None:
    [served] = kubernetes_app().served
    selected = {stage.label_selector["stage"] for stage in served.stages.values()}
    groups = ray_service()["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert selected == {group["labels"]["stage"] for group in groups} == {group["groupName"] for group in groups}


def test_all_files_name_the_version_of_ray_that_is_tested() -> None:
    image = f"rayproject/ray:{RAY_VERSION}-py311-gpu"
    assert launcher_config()["docker"]["image"] == image
    assert dockerfile("Dockerfile", "FROM") == [[image]]
    assert ray_service()["spec"]["rayClusterConfig"]["rayVersion"] == RAY_VERSION


IMAGES = ("Dockerfile", "Dockerfile.cpu", "Dockerfile.gpu")
"""One image for nodes of a cluster, two for a single machine."""


def dockerfile(file: str, instruction: str) -> list[list[str]]:
    """Returns the words of every such instruction, without its flags."""
    lines = (LAUNCH / file).read_text().replace("\\\n", "").splitlines()
    found = [shlex.split(line)[1:] for line in lines if line.startswith(f"{instruction} ")]
    return [[word for word in words if not word.startswith("--chown")] for words in found]


@pytest.mark.parametrize("file", IMAGES)
def test_an_image_holds_all_packages_and_nothing_that_is_not_there(file: str) -> None:
    sources = {word for words in dockerfile(file, "COPY") for word in words[:-1] if "--from=wheel" not in words}
    assert all((ROOT / source).exists() for source in sources)
    assert {"cluster", "deployments", "serve_app", "configs", "pyproject.toml", "constraints.txt"} <= sources
    ignored = (LAUNCH / f"{file}.dockerignore").read_text().splitlines()
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == sources


@pytest.mark.parametrize("file", ["Dockerfile", "Dockerfile.cpu"])
def test_an_images_command_serves_the_quickstart_to_the_outside(file: str) -> None:
    """`--host` itself is tested in serve_app/commands/test_serve.py."""
    found = re.findall(r"^(?:ENTRYPOINT|CMD) (\[.*\])$", (LAUNCH / file).read_text(), re.MULTILINE)
    command = [word for part in found for word in json.loads(part)]
    assert command == ["relay", "serve", "quickstart", "--host", "0.0.0.0", "--open", "--verbose"]
    assert find_config(Path(command[2])) != Path(command[2])


@pytest.mark.parametrize("file", ["Dockerfile.cpu", "Dockerfile.gpu"])
def test_an_image_asks_pip_for_what_the_wheel_needs(file: str, tmp_path: Path) -> None:
    """Runs the line that reads pyproject.toml as the image's shell would."""
    [words] = [words for words in dockerfile(file, "RUN") if "requirements.txt" in words]
    program = shlex.join([sys.executable, *words[1 : words.index(">")]])
    told = subprocess.run(program, shell=True, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    required = [Requirement(line) for line in told.splitlines()]
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert required == [Requirement(line) for line in needed]


def test_the_composed_services_are_built_of_these_images() -> None:
    composed = yaml.safe_load((LAUNCH / "compose.yaml").read_text())
    assert composed.keys() == {"name", "services", "volumes"}
    for name, service in composed["services"].items():
        assert service.keys() <= COMPOSED
        file = Path(service["build"]["dockerfile"])
        assert (LAUNCH / service["build"]["context"]).resolve() == ROOT
        assert (file.parent, file.name in IMAGES) == (Path("cluster/launch"), True)
        assert f"-t {service['image']} ." in (ROOT / file).read_text()
        assert service["ports"] == ["127.0.0.1:8000:8000"]
        home = f"/home/{dockerfile(file.name, 'USER')[0][0]}"
        mounts = dict(volume.split(":", 1) for volume in service["volumes"] if not volume.startswith("$"))
        assert mounts.keys() <= composed["volumes"].keys()
        made = [home + "/" + word for words in dockerfile(file.name, "RUN") for word in words if "state" in word]
        assert mounts["jobs"] in made, name


def test_the_composed_gpu_service_serves_a_config_that_is_there() -> None:
    command = yaml.safe_load((LAUNCH / "compose.yaml").read_text())["services"]["gpu"]["command"]
    [name] = re.findall(r"^\$\{CONFIG:-(\w+)\}$", command[1])
    assert [command[0], *command[2:]] == ["serve", "--host", "0.0.0.0", "--open", "--verbose"]
    assert (ROOT / "configs" / f"{name}.yaml").is_file()


ONE_MACHINE_ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"}
"""This variable binds Ray to the loopback interface, so nodes of a cluster must not have it."""


@pytest.mark.parametrize("file", ["Makefile", "cluster/launch/Dockerfile", "cluster/launch/cluster.yaml"])
def test_whoever_starts_ray_gives_it_the_same_environment(file: str) -> None:
    text = _unquoted(re.sub(r"[ \t]*=[ \t]*", "=", (ROOT / file).read_text()))
    left_out = set() if file == "Makefile" else ONE_MACHINE_ALONE
    expected = {_unquoted(f"{name}={value}") for name, value in RAY_ENVIRONMENT.items() if name not in left_out}
    assert expected
    assert {each for each in expected if each not in text} == set()


def _unquoted(text: str) -> str:
    return re.sub(r"[\\'\"]", "", text)

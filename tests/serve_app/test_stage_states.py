"""Tests, without Serve, of what is concluded from Serve's status of a stage."""

import pytest
from ray.serve._private.common import DeploymentStatusTrigger
from ray.serve.schema import ApplicationStatus, DeploymentStatus, DeploymentStatusOverview, ReplicaState

from serve_app.models.replicas import ASLEEP, MAX_MESSAGE_CHARACTERS, WAKING, Told, _told

TOO_MANY_CPUS = 'Resources required for each replica: {"CPU": 64.0}, total resources available: {"CPU": 2.0}.'


@pytest.mark.parametrize(
    ("told", "at_rest"),
    [
        (Told("HEALTHY", "", {}), ASLEEP),
        (Told("HEALTHY", "", {"RUNNING": 0}), ASLEEP),
        (Told("DOWNSCALING", "", {"STOPPING": 1}), ASLEEP),
        (Told("DOWNSCALING", "", {}), ASLEEP),
        (Told("UPSCALING", "", {"STARTING": 1}), WAKING),
        (Told("UPSCALING", "", {}), WAKING),
        (Told("HEALTHY", "", {"RUNNING": 1}), None),
        (Told("DOWNSCALING", "", {"RUNNING": 1, "STOPPING": 1}), None),
        (Told("UPSCALING", "", {"RUNNING": 1, "STARTING": 1}), None),
        (Told("UPSCALING", TOO_MANY_CPUS, {"STARTING": 1}), None),
        (Told("UPSCALING", TOO_MANY_CPUS, {"STARTING": 1}, may_sleep=True), WAKING),
        (Told("UPDATING", "", {"STARTING": 1}), None),
        (Told("UNHEALTHY", "", {}), None),
        (Told("DEPLOY_FAILED", "", {}), None),
        (Told("UNKNOWN"), None),
    ],
    ids=str,
)
def test_a_stage_at_rest_needs_no_replica_and_no_call_to_tell(told: Told, at_rest: str | None) -> None:
    assert told.at_rest == at_rest


def test_states_may_be_words_or_of_serves_own_kind() -> None:
    deployment = DeploymentStatusOverview(
        status=DeploymentStatus.HEALTHY,
        status_trigger=DeploymentStatusTrigger.UNSPECIFIED,
        replica_states={ReplicaState.RUNNING: 1, "STOPPING": 2},  # type: ignore[dict-item]
        message="",
    )
    application = Application()
    application.deployments = {"Vae": deployment}
    told = _told(application, Handle())  # type: ignore[arg-type]
    assert (told.state, told.num_replicas) == ("HEALTHY", {"RUNNING": 1, "STOPPING": 2})


class Handle:
    app_name, deployment_name = "relay", "Vae"


class Application:
    """Serve's status of an application whose deploy failed: it lists no deployments."""

    status = ApplicationStatus.DEPLOY_FAILED
    deployments: dict[str, object] = {}  # noqa: RUF012
    message = "Traceback (most recent call last):\n  File ...\nConfigError: model: unknown key 'famly'"


def test_after_a_failed_deploy_its_reason_is_the_stages_message() -> None:
    told = _told(Application(), Handle())  # type: ignore[arg-type]
    assert (told.state, told.message) == ("DEPLOY_FAILED", "ConfigError: model: unknown key 'famly'")


def test_an_application_that_is_gone_is_told_as_such() -> None:
    told = _told(None, Handle())  # type: ignore[arg-type]
    assert (told.state, told.message) == ("UNKNOWN", "Serve knows no application 'relay'")


def test_a_message_is_cut() -> None:
    application = Application()
    application.message = "x" * 100_000
    assert len(_told(application, Handle()).message) == MAX_MESSAGE_CHARACTERS  # type: ignore[arg-type]

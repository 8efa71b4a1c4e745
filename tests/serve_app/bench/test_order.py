"""Tests over HTTP of the queue's order, beside endless requests that exceed max_ongoing_requests."""

from collections.abc import Iterator
from typing import Any

import pytest

from deployments.config.transformer import TransformerConfig
from tests.keyed_app import ENDLESS, UNMEASURED

pytestmark = pytest.mark.slow
IMAGES = "/v1/images/generations"
PROMPT = {"prompt": "a cat", "num_inference_steps": 2}
NUM_AT_WORK = TransformerConfig().max_ongoing_requests


@pytest.fixture(scope="module")
def crowd(flux_app: Any, patient_app: Any) -> Iterator[None]:
    """Endless requests of one user, one more than max_ongoing_requests."""
    fields = {"prompt": "a dog", "num_inference_steps": ENDLESS, "user": "crowd"}
    numbers = [10, 10, 10, NUM_AT_WORK + 1 - 30]
    running = [patient_app.handle.generate.remote(**fields, n=number) for number in numbers]
    flux_app.wait_for_seats(sum(numbers))
    yield
    for response in running:
        response.cancel()
    flux_app.wait_for_seats(0)


@pytest.mark.thorough
def test_one_user_is_answered_beside_another_with_more_requests_than_may_be_at_work(
    crowd: None, patient_app: Any
) -> None:
    answer = patient_app.client.post(IMAGES, json=PROMPT | {"user": "one", "num_inference_steps": 50})
    assert answer.status_code == 200, answer.text


def test_a_short_request_overtakes_long_ones_of_its_user(crowd: None, patient_app: Any) -> None:
    answer = patient_app.client.post(IMAGES, json=PROMPT | {"user": "crowd"})
    assert answer.status_code == 200, answer.text


def test_what_cannot_meet_its_deadline_is_ended_before_it_has_passed(
    crowd: None, flux_app: Any, patient_app: Any
) -> None:
    asked = PROMPT | {"size": UNMEASURED, "num_inference_steps": ENDLESS, "deadline_s": 4, "user": "hasty"}
    answer = patient_app.client.post(IMAGES, json=asked)
    assert answer.status_code == 504
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("deadline_exceeded", "deadline_s")
    assert error["message"].startswith("not done within deadline_s (4 s): ")
    assert "steps that are left" in error["message"]
    flux_app.wait_for_seats(NUM_AT_WORK + 1)

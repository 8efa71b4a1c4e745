"""Tests that a body that is stored with a job is read back unchanged."""

import asyncio
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from serve_app.http.openai_requests import EditBody, ImageBody, VideoBody
from serve_app.jobs.body import keep_body, read_body
from serve_app.jobs.config import JobsConfig
from serve_app.jobs.job import Asked, Job
from serve_app.jobs.jobs import Jobs
from tests.serve_app.jobs import jobs_ingress
from tests.serve_app.pictures import file, half_mask, noise

REQUESTS = jobs_ingress.relay("flux").validator.validate(ImageBody(prompt="a cat", seed=7)).requests
ONE, TWO = file(noise(0)), file(noise(1))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (ImageBody, {"n": 2, "output_format": "jpeg", "output_compression": 80, "guidance_scale": 3.5}),
        (ImageBody, {"step_cache": {"kind": "taylor_seer", "interval": 3}, "background": True}),
        (EditBody, {"image": ONE}),
        (EditBody, {"image": (ONE, TWO), "mask": file(half_mask()), "strength": 0.5}),
        (EditBody, {"control_image": TWO}),
        (VideoBody, {"num_frames": 5, "fps": 12, "input_reference": ONE}),
        (VideoBody, {"seconds": 2.5, "negative_prompt": "\N{SNOWMAN}"}),
    ],
)
def test_a_body_is_read_as_it_was_kept(kind: Any, fields: dict[str, Any], tmp_path: Path) -> None:
    body = kind(prompt="a cat", seed=7, **fields)
    asked, files = keep_body(body, REQUESTS)
    stored = Asked(**json.loads(json.dumps(asdict(asked))))

    async def read() -> Any:
        jobs = Jobs(JobsConfig(database=f"sqlite:///{tmp_path}/jobs.db"), "")
        job = Job("image_1", "image", "m", None, 0.0, replace(stored, takes_several=tuple(stored.takes_several)))
        await jobs.accept(job, files)
        return await read_body(jobs, job)

    assert asyncio.run(read()) == body

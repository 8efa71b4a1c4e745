"""One attempt at a job: sends its body through the stages, which write the output into the job's folder.

The stages also store finished steps there, and the next attempt continues from them even after a full restart.
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from contextlib import aclosing

from deployments.answers import Progress
from deployments.media.target_file import thumbnail_of
from deployments.request import StreamOptions
from serve_app.errors import DeadlineExceeded, Overloaded, StageFailed, Unavailable
from serve_app.flow.events import Picture
from serve_app.flow.target import Target
from serve_app.http.body_validation import validate_body
from serve_app.jobs.body import read_body
from serve_app.jobs.job import Job, Output
from serve_app.jobs.jobs import Jobs
from serve_app.relay import Relay
from serve_app.validation import ValidatedBody

AGAIN_AFTER_S = 1.0
"""Seconds before a retry, if the limit on requests in progress is reached or the store does not answer."""
DENOISED = 97
"""Progress in percent when the last step is done."""

STORE_TRIES = 5


class Attempt:
    """One attempt at one job."""

    def __init__(
        self, jobs: Jobs, job: Job, relay_of: Callable[[str], Relay], tell: Callable[[int], None]
    ) -> None:
        """tell: called with the progress in percent."""
        self._jobs, self._job, self._relay_of, self._tell = jobs, job, relay_of, tell
        self.files: list[str] = []
        """Names of files that may have been written; no other attempt uses them."""

    async def draw(self) -> tuple[Output, ...]:
        """Runs the job and returns its outputs. Raises RelayError.

        Retries for up to jobs.timeout_s if there is no room or the store does not answer. The body's deadline_s
        counts from when the job was created.
        """
        timeout_s, why = self._jobs.config.timeout_s, ""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        return await self._draw()
                    except (Overloaded, Unavailable) as waits_for:
                        why = f"; the last attempt failed: {waits_for}"
                        await asyncio.sleep(AGAIN_AFTER_S)
        except (TimeoutError, DeadlineExceeded) as error:
            if isinstance(error, DeadlineExceeded) and error.param == "deadline_s":
                raise
            raise DeadlineExceeded(f"not done within jobs.timeout_s ({timeout_s:g} s){why}") from error

    async def _draw(self) -> tuple[Output, ...]:
        relay = self._relay_of(self._job.model)
        validated = await validate_body(relay.validator, await read_body(self._jobs, self._job))
        attempt = secrets.token_hex(4)
        names = [f"{i}-{attempt}.{each.output_format}" for i, each in enumerate(validated.requests)]
        self.files += [*names, *map(thumbnail_of, names)]
        pictures = await self._pictures(relay, validated, names)
        return tuple([await self._output(name, picture) for name, picture in zip(names, pictures, strict=True)])

    async def _pictures(self, relay: Relay, validated: ValidatedBody, names: list[str]) -> list[Picture]:
        files = await self._jobs.open_files()
        events = relay.events(
            validated.requests,
            StreamOptions(wants_progress=True),
            pictures=validated.pictures,
            qos=validated.qos.asked_by(self._job.owner).after(time.time() - self._job.created_at),
            targets=[
                Target(files.url(self._job.id, name), files.url(self._job.id, str(i)))
                for i, name in enumerate(names)
            ],
            timeout_s=self._jobs.config.timeout_s,
        )
        made: dict[int, Picture] = {}
        percents = [0.0] * len(validated.requests)
        async with aclosing(events):
            async for event in events:
                if event is None:
                    continue
                if isinstance(event.payload, Picture):
                    made[event.index] = event.payload
                    percents[event.index] = 100.0
                elif isinstance(event.payload, Progress):
                    percents[event.index] = DENOISED * event.payload.step / event.payload.num_steps
                self._tell(min(99, int(sum(percents) / len(percents))))
        return [made[i] for i in range(len(percents))]

    async def _output(self, name: str, picture: Picture) -> Output:
        media, num_bytes = picture.media, picture.media.num_written
        if num_bytes is None:  # the stage cannot reach the folder
            num_bytes = len(media.data)
            await self._store(name, media.data)
            if media.thumbnail:
                await self._store(thumbnail_of(name), media.thumbnail)
        thumbnail = None if media.thumbnail is None else thumbnail_of(name)
        facts = picture.facts | {"quality": picture.quality}
        return Output(name, media.media_type, num_bytes, facts, thumbnail)

    async def _store(self, name: str, data: bytes) -> None:
        """Writes a file, with retries, since drawing again costs more. Raises StageFailed after STORE_TRIES."""
        for tried in range(STORE_TRIES):
            try:
                await self._jobs.write(self._job.id, name, data)
                return
            except Unavailable as error:
                why = error.__cause__
                await asyncio.sleep(AGAIN_AFTER_S * 2**tried)
        raise StageFailed(f"the output cannot be stored: {why}")

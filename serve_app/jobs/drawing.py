"""One attempt at a job: its body through the stages, which write what comes out where the job keeps it."""

import asyncio
import secrets
from collections.abc import Callable
from contextlib import aclosing

from deployments.request import Progress, StreamOptions
from serve_app.errors import DeadlineExceeded, Overloaded, StageFailed, Unavailable
from serve_app.generation import Picture
from serve_app.jobs.body import read_body
from serve_app.jobs.job import Job, Output
from serve_app.jobs.jobs import Jobs
from serve_app.judging import judge
from serve_app.relay import Relay
from serve_app.validation import Judged

AGAIN_AFTER_S = 1.0
"""Where as many requests are in progress as may be, or the store does not answer."""
DENOISED = 97
"""Percent, when the last step is done."""

STORE_TRIES = 5


class Attempt:
    """At one job."""

    def __init__(
        self, jobs: Jobs, job: Job, relay_of: Callable[[str], Relay], tell: Callable[[int], None]
    ) -> None:
        """tell: how far it has come, in percent."""
        self._jobs, self._job, self._relay_of, self._tell = jobs, job, relay_of, tell
        self.files: list[str] = []
        """That may have been written: names that no other attempt has."""

    async def draw(self) -> tuple[Output, ...]:
        """Within jobs.timeout_s; waits where there is no room or the store does not answer. Raises RelayError."""
        timeout_s = self._jobs.config.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        return await self._draw()
                    except (Overloaded, Unavailable):
                        await asyncio.sleep(AGAIN_AFTER_S)
        except (TimeoutError, DeadlineExceeded) as error:
            raise DeadlineExceeded(f"not done within jobs.timeout_s ({timeout_s:g} s)") from error

    async def _draw(self) -> tuple[Output, ...]:
        relay = self._relay_of(self._job.model)
        judged = await judge(relay.validator, await read_body(self._jobs, self._job))
        attempt = secrets.token_hex(4)
        names = [f"{i}-{attempt}.{each.output_format}" for i, each in enumerate(judged.requests)]
        self.files += names
        pictures = await self._pictures(relay, judged, names)
        return tuple([await self._output(name, picture) for name, picture in zip(names, pictures, strict=True)])

    async def _pictures(self, relay: Relay, judged: Judged, names: list[str]) -> list[Picture]:
        files = await self._jobs.open_files()
        events = relay.events(
            judged.requests,
            StreamOptions(wants_progress=True),
            pictures=judged.pictures,
            targets=[files.url(self._job.id, name) for name in names],
            timeout_s=self._jobs.config.timeout_s,
        )
        made: dict[int, Picture] = {}
        percents = [0.0] * len(judged.requests)
        async with aclosing(events):
            async for event in events:
                if event is None:
                    continue
                if isinstance(event.news, Picture):
                    made[event.index] = event.news
                    percents[event.index] = 100.0
                elif isinstance(event.news, Progress):
                    percents[event.index] = DENOISED * event.news.step / event.news.num_steps
                self._tell(min(99, int(sum(percents) / len(percents))))
        return [made[i] for i in range(len(percents))]

    async def _output(self, name: str, picture: Picture) -> Output:
        media, num_bytes = picture.media, picture.media.num_written
        if num_bytes is None:  # its stage does not see the folder
            num_bytes = len(media.data)
            await self._store(name, media.data)
        return Output(name, media.media_type, num_bytes, picture.facts | {"quality": picture.quality})

    async def _store(self, name: str, data: bytes) -> None:
        """Rather than draw it once more, ask once more. Raises StageFailed."""
        for tried in range(STORE_TRIES):
            try:
                await self._jobs.write(self._job.id, name, data)
                return
            except Unavailable as error:
                why = error.__cause__
                await asyncio.sleep(AGAIN_AFTER_S * 2**tried)
        raise StageFailed(f"what was drawn cannot be stored: {why}")

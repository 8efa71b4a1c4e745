"""Tests of which runner draws a job, and of what is recorded of it. A stand-in for the relay sends the events."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request

from deployments.answers import Denoised, ForwardCounts, Media, Progress
from deployments.media.target_file import thumbnail_of, write_file
from deployments.options.qos import Qos
from deployments.request import GenerationRequest
from serve_app.errors import OutOfDeviceMemory, Overloaded, Unavailable
from serve_app.flow.deadline import RequestDeadline
from serve_app.flow.events import Event, Picture
from serve_app.flow.target import Target
from serve_app.http.body_validation import validate_body
from serve_app.http.openai_requests import VideoBody
from serve_app.inputs.videos import blank_video
from serve_app.jobs import drawing, runner
from serve_app.jobs import jobs as jobs_module
from serve_app.jobs.config import JobsConfig
from serve_app.jobs.files import JobFiles
from serve_app.jobs.intake import JobIntake
from serve_app.jobs.job import Job, Status
from serve_app.jobs.jobs import Jobs
from serve_app.jobs.runner import MOST_TAKEN, Runner
from serve_app.jobs.store import JobStore
from serve_app.models.served_models import Models
from serve_app.relay import Relay
from tests.serve_app.jobs import jobs_ingress

pytestmark = pytest.mark.slow

DATA, STILL = b"a video", b"a still"
PATIENCE_S = 20.0


class Stages(Relay):
    """A relay whose requests end when a test says so."""

    def __init__(self) -> None:
        self._relay = jobs_ingress.relay("wan")
        self._model, self._created, self._limits = self._relay._model, 0, self._relay._limits
        self.validator = self._relay.validator
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.num_begun = self.num_running = 0
        self.seeds: list[int] = []
        self.qos_seen: list[Qos] = []
        self.errors: list[Exception] = []
        self.sees_folder = True

    async def events(  # type: ignore[override]
        self,
        requests: list[GenerationRequest],
        *_: Any,
        qos: Qos,
        targets: Sequence[Target],
        timeout_s: float,
        **__: Any,
    ) -> AsyncGenerator[Event | None, None]:
        if self.errors:
            raise self.errors.pop(0)
        self.num_begun += 1
        self.num_running += 1
        self.seeds.append(requests[0].seed)
        self.qos_seen.append(qos)
        if not (deadline := RequestDeadline(qos, timeout_s)).limit_s:
            raise deadline.exceeded()
        try:
            for step in range(3):
                yield Event(0, Progress(step, 4, None))
            await self.may_end.wait()
            url = str(targets[0].url)
            is_written = self.sees_folder and write_file(url, DATA)
            media = Media(DATA, "video/mp4", 1.0, thumbnail=STILL)
            if is_written:
                write_file(thumbnail_of(url), STILL)
                media = Media(b"", "video/mp4", 1.0, len(DATA), b"")
            denoised = Denoised(1.0, 0.0, 1.0, 1.0, ForwardCounts(4, 4))
            yield Event(0, Picture(media, requests[0], denoised))
        finally:
            self.num_running -= 1


class Ingress:
    """The parts of one ingress replica that handle jobs."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self.stages = Stages()
        config = {"database": f"sqlite:///{folder}/jobs.db", "lease_s": 1.0} | config
        self.given_back: list[tuple[str, float, float]] = []
        self.jobs = Jobs(JobsConfig(**config), "", lambda *told: self.given_back.append(told))
        models = Models([self.stages])
        self.intake = JobIntake(self.jobs, models)
        self.runner = Runner(self.jobs, models)
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        await self._stack.enter_async_context(self.runner.lifespan(None))

    async def end(self) -> None:
        """Ends in an orderly way: the runner gives its jobs back."""
        await self._stack.aclose()

    async def die(self) -> None:
        """Ends as by SIGKILL: the store hears nothing from this ingress any more."""
        self.lose_store()
        await self._stack.aclose()

    def lose_store(self) -> Callable[[], None]:
        """Makes the store unreachable, and returns a function that makes it reachable again."""
        call = self.jobs._call
        self.jobs._call = _unreachable  # type: ignore[method-assign]
        return lambda: setattr(self.jobs, "_call", call)

    async def create(self, owner: str | None = None, **fields: Any) -> Job:
        body = VideoBody(prompt="waves", num_frames=5, **fields)
        request = Request({"type": "http", "headers": [], "state": {"key_name": owner}})
        return await self.intake.take(request, self.stages, body, await validate_body(self.stages.validator, body))

    async def until(self, job: Job, status: Status) -> Job:
        return await until(lambda: self._told(job), lambda told: told.status == status)

    async def _told(self, job: Job) -> Job:
        return await self.jobs.get(job.id, "video", job.owner)


async def _unreachable(*_: Any) -> Any:
    raise Unavailable("the store is out of reach")


async def until(look: Callable[[], Awaitable[Any]], is_so: Callable[[Any], bool]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so(seen := await look()):
        assert time.monotonic() < deadline, seen
        await asyncio.sleep(0.01)
    return seen


async def running(ingress: Ingress, num: int) -> None:
    async def look() -> int:
        return ingress.stages.num_running

    await until(look, lambda seen: seen == num)


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LOOK_EVERY_S", 0.02)
    for module in (runner, drawing):
        monkeypatch.setattr(module, "AGAIN_AFTER_S", 0.02)


def files_of(folder: Path, job: Job) -> list[str]:
    path = folder / "files" / job.id
    return sorted(each.name for each in path.iterdir()) if path.exists() else []


def play(scene: Callable[..., Awaitable[None]], folder: Path, num: int = 1, **config: Any) -> None:
    """Runs the scene with `num` ingress replicas that share the folder."""

    async def begin() -> None:
        ingresses = [Ingress(folder, **config) for _ in range(num)]
        try:
            for each in ingresses:
                await each.start()
            await scene(*ingresses)
        finally:
            for each in ingresses:
                await each.end()

    asyncio.run(begin())


def test_a_job_is_drawn_where_it_will_be_read(tmp_path: Path) -> None:
    async def scene(ingress: Ingress) -> None:
        job = await ingress.create()
        told = await ingress.until(job, "completed")
        assert (told.progress, told.runner, told.num_taken) == (100, None, 1)
        [output] = told.outputs
        folder = tmp_path / "files" / job.id
        assert [(folder / name).read_bytes() for name in output.files] == [DATA, STILL]
        assert files_of(tmp_path, job) == output.files
        assert told.expires_at == pytest.approx(time.time() + 86_400, abs=60)
        assert ingress.stages.seeds == [job.asked.fields["seed"]]

    play(scene, tmp_path)


def test_a_jobs_deadline_counts_from_when_it_was_taken_in(tmp_path: Path) -> None:
    async def scene(ingress: Ingress) -> None:
        ingress.stages.may_end.clear()
        first = await ingress.create(priority="low", user="ann", deadline_s=600)
        late = await ingress.create(deadline_s=0.05)
        await running(ingress, 1)
        await asyncio.sleep(0.1)
        ingress.stages.may_end.set()
        told = await ingress.until(late, "failed")
        assert told.failure is not None
        assert (told.failure.code, told.failure.param) == ("deadline_exceeded", "deadline_s")
        assert told.failure.message == "not done within deadline_s (0.05 s)"
        await ingress.until(first, "completed")
        qos = ingress.stages.qos_seen[0]
        assert (qos.priority, qos.share) == ("low", "ann")
        assert qos.deadline_s == 600
        assert qos.waited_s > 0

    play(scene, tmp_path, max_running=1)


def test_what_a_stage_without_the_folder_answers_with_is_written_here(tmp_path: Path) -> None:
    async def scene(ingress: Ingress) -> None:
        ingress.stages.sees_folder = False
        told = await ingress.until(await ingress.create(), "completed")
        [output] = told.outputs
        assert output.num_bytes == len(DATA)
        assert files_of(tmp_path, told) == output.files

    play(scene, tmp_path)


def test_what_cannot_be_stored_at_once_is_stored_later_and_not_drawn_twice(tmp_path: Path) -> None:
    async def scene(ingress: Ingress) -> None:
        ingress.stages.sees_folder = False
        ingress.stages.may_end.clear()
        job = await ingress.create()
        await running(ingress, 1)
        folder, hidden = tmp_path / "files", tmp_path / "hidden"
        folder.rename(hidden)
        folder.touch()
        ingress.stages.may_end.set()
        await running(ingress, 0)
        folder.unlink()
        hidden.rename(folder)
        [output] = (await ingress.until(job, "completed")).outputs
        assert (folder / job.id / output.file).read_bytes() == DATA
        assert ingress.stages.num_begun == 1

    play(scene, tmp_path)


def test_a_job_whose_video_cannot_be_stored_fails_with_the_reason(tmp_path: Path) -> None:
    async def scene(ingress: Ingress) -> None:
        ingress.stages.sees_folder = False
        ingress.stages.may_end.clear()
        job = await ingress.create()
        await running(ingress, 1)
        (tmp_path / "files").rename(tmp_path / "hidden")
        (tmp_path / "files").touch()
        ingress.stages.may_end.set()
        told = await ingress.until(job, "failed")
        assert told.failure is not None
        assert told.failure.message.startswith("the output cannot be stored: ")

    play(scene, tmp_path)


def test_progress_is_told_while_it_is_drawn(tmp_path: Path) -> None:
    async def scene(ingress: Ingress) -> None:
        ingress.stages.may_end.clear()
        job = await ingress.create()
        told = await until(lambda: ingress._told(job), lambda told: told.progress > 0)
        assert (told.status, told.progress) == ("in_progress", 48)

    play(scene, tmp_path)


def test_a_job_fails_with_the_reason(tmp_path: Path) -> None:
    async def scene(ingress: Ingress) -> None:
        ingress.stages.errors = [OutOfDeviceMemory("the decode stage is too small")]
        told = await ingress.until(await ingress.create(), "failed")
        assert told.failure is not None
        assert (told.failure.code, told.failure.message) == ("out_of_memory", "the decode stage is too small")

    play(scene, tmp_path)


def test_what_a_job_that_fails_has_cost_is_given_back(tmp_path: Path) -> None:
    async def scene(ingress: Ingress) -> None:
        ingress.stages.errors = [OutOfDeviceMemory("the decode stage is too small")]
        failed = await ingress.create("shop")
        await ingress.until(failed, "failed")
        await ingress.until(await ingress.create("shop"), "completed")
        assert ingress.given_back == [("shop", 64 * 64 * 5 * 4 / 1e6, failed.created_at)]

    play(scene, tmp_path)


def test_what_a_job_has_cost_is_given_back_if_it_is_cancelled_before_it_began(tmp_path: Path) -> None:
    async def scene(ingress: Ingress) -> None:
        ingress.stages.may_end.clear()
        runs, waits = [await ingress.create("shop") for _ in range(2)]
        await running(ingress, 1)
        for job in (runs, waits):
            await ingress.jobs.delete(job.id, "video", "shop")
        assert ingress.given_back == [("shop", 64 * 64 * 5 * 4 / 1e6, waits.created_at)]

    play(scene, tmp_path, max_running=1)


def test_a_job_waits_while_the_stages_are_full(tmp_path: Path) -> None:
    async def scene(ingress: Ingress) -> None:
        ingress.stages.errors = [Overloaded("full"), Overloaded("full")]
        await ingress.until(await ingress.create(), "completed")

    play(scene, tmp_path)


def test_a_job_past_its_time_fails(tmp_path: Path) -> None:
    async def scene(ingress: Ingress) -> None:
        ingress.stages.may_end.clear()
        told = await ingress.until(await ingress.create(), "failed")
        assert told.failure is not None
        assert told.failure.message == "not done within jobs.timeout_s (0.2 s)"
        assert ingress.stages.num_running == 0

    play(scene, tmp_path, timeout_s=0.2)


def test_a_job_that_could_never_begin_says_what_it_waited_for(tmp_path: Path) -> None:
    async def scene(ingress: Ingress) -> None:
        ingress.stages.errors = [Unavailable("no replica of Vae is there")] * 99
        told = await ingress.until(await ingress.create(), "failed")
        assert told.failure is not None
        assert told.failure.message.endswith("(0.3 s); the last attempt failed: no replica of Vae is there")

    play(scene, tmp_path, timeout_s=0.3)


def test_no_more_are_drawn_at_once_than_may(tmp_path: Path) -> None:
    async def scene(ingress: Ingress) -> None:
        ingress.stages.may_end.clear()
        jobs = [await ingress.create() for _ in range(3)]
        await running(ingress, 2)
        await asyncio.sleep(0.2)
        assert ingress.stages.num_begun == 2
        assert (await ingress._told(jobs[2])).status == "queued"
        ingress.stages.may_end.set()
        for job in jobs:
            await ingress.until(job, "completed")

    play(scene, tmp_path, max_running=2)


def test_a_cancelled_job_is_given_up_at_once(tmp_path: Path) -> None:
    async def scene(first: Ingress, second: Ingress) -> None:
        """Each ingress cancels one job, whichever of them draws it."""
        for each in (first, second):
            each.stages.may_end.clear()
        for deletes in (first, second):
            await cancel(first, deletes)
            for each in (first, second):
                await running(each, 0)

    async def cancel(creates: Ingress, deletes: Ingress) -> None:
        job = await creates.create()
        await until(lambda: creates._told(job), lambda told: told.status == "in_progress")
        await deletes.jobs.delete(job.id, "video", None)
        assert (await creates._told(job)).status == "cancelled"
        assert files_of(tmp_path, job) == []

    play(scene, tmp_path, num=2)


def test_an_ingress_that_ends_gives_its_jobs_back(tmp_path: Path) -> None:
    async def scene(first: Ingress, second: Ingress) -> None:
        first.stages.may_end.clear()
        await second.end()
        job = await first.create()
        await running(first, 1)
        await first.end()
        told = await first._told(job)
        assert (told.status, told.num_taken) == ("queued", 0)
        second.stages.may_end.set()
        await second.start()
        await second.until(job, "completed")

    play(scene, tmp_path, num=2, lease_s=600)


def test_a_dead_ingress_loses_its_jobs_to_one_other(tmp_path: Path) -> None:
    async def scene(dead: Ingress, *others: Ingress) -> None:
        for each in others:
            await each.end()
        dead.stages.may_end.clear()
        jobs = [await dead.create() for _ in range(4)]
        await running(dead, 4)
        await dead.die()
        for each in others:
            await each.start()
        for job in jobs:
            told = await others[0].until(job, "completed")
            assert told.num_taken == 2
            assert files_of(tmp_path, job) == told.outputs[0].files
        assert sum(each.stages.num_begun for each in others) == 4

    play(scene, tmp_path, num=3)


def test_who_was_only_slow_ends_nothing_of_what_another_has_taken(tmp_path: Path) -> None:
    async def scene(slow: Ingress, quick: Ingress) -> None:
        await quick.end()
        slow.stages.may_end.clear()
        job = await slow.create()
        await running(slow, 1)
        find_store = slow.lose_store()
        await quick.start()
        told = await quick.until(job, "completed")
        slow.stages.may_end.set()
        await running(slow, 0)
        find_store()
        await until(lambda: asyncio.sleep(0, slow.runner._running), lambda seen: not seen)
        assert await quick._told(job) == told
        assert files_of(tmp_path, job) == told.outputs[0].files

    play(scene, tmp_path, num=2)


def test_whose_beat_was_heard_and_not_answered_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection breaks after the beat is stored: no other runner takes the job, and it is drawn once."""
    renew = JobStore.renew

    def renew_unheard(store: JobStore, *told: Any) -> bool:
        renew(store, *told)
        raise Unavailable("the connection broke")

    async def scene(ingress: Ingress) -> None:
        ingress.stages.may_end.clear()
        job = await ingress.create()
        with monkeypatch.context() as breaking:
            breaking.setattr(JobStore, "renew", renew_unheard)
            await until(lambda: ingress._told(job), lambda told: told.progress > 0)
            ingress.stages.may_end.set()
            await running(ingress, 0)
        told = await ingress.until(job, "completed")
        assert (told.num_taken, ingress.stages.num_begun) == (1, 1)

    play(scene, tmp_path)


def test_a_job_that_waits_for_longer_than_results_are_kept_is_drawn_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "EXPIRE_EVERY_S", 0.05)

    async def scene(ingress: Ingress) -> None:
        ingress.stages.may_end.clear()
        jobs = [await ingress.create() for _ in range(2)]
        await running(ingress, 1)
        later = time.time() + 1e6
        monkeypatch.setattr(jobs_module.time, "time", lambda: later)
        await asyncio.sleep(0.5)
        assert [(await ingress._told(job)).status for job in jobs] == ["in_progress", "queued"]
        ingress.stages.may_end.set()
        await ingress.until(jobs[1], "completed")

    play(scene, tmp_path, max_running=1)


def test_a_job_whose_files_cannot_be_deleted_keeps_no_other_from_expiring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "EXPIRE_EVERY_S", 0.05)
    remove = JobFiles.remove

    async def scene(ingress: Ingress) -> None:
        stuck, _ = [await ingress.create() for _ in range(2)]

        def refuse(files: JobFiles, job_id: str, name: str | None = None) -> None:
            if job_id == stuck.id and name is None:
                raise PermissionError("not yours")
            remove(files, job_id, name)

        monkeypatch.setattr(JobFiles, "remove", refuse)

        async def left() -> list[Path]:
            return list((tmp_path / "files").iterdir())

        await until(left, lambda folders: [folder.name for folder in folders] == [stuck.id])

    play(scene, tmp_path, expire_after_s=0.3)


def test_a_database_that_takes_questions_and_answers_none_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung = threading.Event()

    async def scene(ingress: Ingress) -> None:
        job = await ingress.create()
        await ingress.end()
        monkeypatch.setattr(jobs_module, "TIMEOUT_S", 0.1)
        monkeypatch.setattr(JobStore, "get", lambda *_: hung.wait(20))
        with pytest.raises(Unavailable, match="database does not answer"):
            await ingress._told(job)
        hung.set()

    play(scene, tmp_path)


def test_progress_never_goes_back(tmp_path: Path) -> None:
    async def scene(dead: Ingress, other: Ingress) -> None:
        await other.end()
        other.stages.may_end.clear()
        dead.stages.may_end.clear()
        job = await dead.create()
        await until(lambda: dead._told(job), lambda told: told.progress == 48)
        await dead.die()
        await other.start()
        seen = []
        await running(other, 1)
        for _ in range(20):
            seen.append((await other._told(job)).progress)
            await asyncio.sleep(0.01)
        assert set(seen) == {48}

    play(scene, tmp_path, num=2)


def test_a_job_that_is_cut_off_again_and_again_fails(tmp_path: Path) -> None:
    async def scene(ingress: Ingress) -> None:
        await ingress.end()
        job = await ingress.create()
        for _ in range(MOST_TAKEN):
            [seen] = await ingress.jobs.unfinished(["tiny-wan"])
            assert await ingress.jobs.take(seen, "one that dies")
        await ingress.start()
        told = await ingress.until(job, "failed")
        assert told.failure is not None
        assert f"was lost {MOST_TAKEN} times" in told.failure.message
        assert ingress.stages.num_begun == 0

    play(scene, tmp_path)


def test_rows_and_files_expire_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "EXPIRE_EVERY_S", 0.05)

    async def scene(ingress: Ingress) -> None:
        job = await ingress.create()
        await ingress.until(job, "completed")

        async def look() -> bool:
            [store, _] = ingress.jobs._opened or ()
            return store.get(job.id, "video", None) is None

        await until(look, bool)
        assert list((tmp_path / "files").iterdir()) == []

    play(scene, tmp_path, expire_after_s=0.5)


def test_an_ingress_without_jobs_opens_no_database(tmp_path: Path) -> None:
    async def scene(ingress: Ingress) -> None:
        await asyncio.sleep(0.2)
        assert ingress.jobs._opened is None
        assert list(tmp_path.iterdir()) == []

    play(scene, tmp_path)


def test_what_went_in_is_there_for_whoever_takes_the_job_up(tmp_path: Path) -> None:
    """The input files are deleted once the job has ended."""

    async def scene(ingress: Ingress) -> None:
        await ingress.end()
        job = await ingress.create()
        given = replace(job, id=f"{job.id}a", asked=replace(job.asked, inputs={"input_reference": ["in-0"]}))
        await ingress.jobs.accept(given, {"in-0": blank_video(5)})
        assert files_of(tmp_path, given) == ["in-0"]
        await ingress.start()
        told = await ingress.until(given, "completed")

        async def look() -> list[str]:
            return files_of(tmp_path, given)

        await until(look, lambda files: files == told.outputs[0].files)

    play(scene, tmp_path)

"""Tests of jobs over HTTP, without a runner."""

import base64
import errno
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.errors import BadRequest
from serve_app.http.fields import parse_body
from serve_app.http.openai_requests import EditBody, ImageBody
from serve_app.inputs.videos import blank_video
from serve_app.jobs import jobs as jobs_module
from serve_app.jobs.files import JobFiles
from serve_app.jobs.job import Ending, Failure
from serve_app.jobs.store import JobStore
from tests.serve_app.jobs.jobs_ingress import JobsIngress

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def ingress(tmp_path: Path) -> JobsIngress:
    return JobsIngress(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> JobsIngress:
    """An ingress for tests that do not depend on which other jobs exist."""
    return JobsIngress(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def film(shared: JobsIngress) -> str:
    """Path of the content of a completed job."""
    made = shared.create()
    shared.complete(made["id"], CONTENT)
    return f"/v1/videos/{made['id']}/content"


def error_of(answer: httpx.Response, status: int) -> Any:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def test_a_video_is_queued_with_what_it_will_be(ingress: JobsIngress) -> None:
    made = ingress.create(size="64x48", seconds=0.5, num_frames=None, fps=8, seed=3)
    assert (made["object"], made["status"], made["progress"]) == ("video", "queued", 0)
    assert (made["size"], made["seconds"], made["num_frames"], made["fps"]) == ("64x48", "0.625", 5, 8)
    assert (made["model"], made["prompt"], made["seed"]) == ("tiny-wan", "waves", 3)
    assert made["error"] is made["completed_at"] is made["expires_at"] is made["remixed_from_video_id"] is None
    assert ingress.ask("GET", f"/v1/videos/{made['id']}").json() == made


def test_a_seed_that_was_drawn_is_kept(shared: JobsIngress) -> None:
    """The video is the same however often the job is begun again."""
    made = shared.create()
    assert shared.taken(made["id"]).asked.fields["seed"] == made["seed"]


@pytest.mark.parametrize("fields", [{"num_frames": 6}, {"colour": "red"}, {"size": "64x72"}, {"prompt": ""}])
def test_what_is_wrong_is_told_before_there_is_a_job(ingress: JobsIngress, fields: dict[str, Any]) -> None:
    answer = ingress.ask("POST", "/v1/videos", json={"prompt": "waves"} | fields)
    assert error_of(answer, 400)["param"] in fields
    assert ingress.ask("GET", "/v1/videos").json()["data"] == []


def test_no_file_is_made_until_there_is_a_job(ingress: JobsIngress) -> None:
    for path in ("/v1/videos", "/v1/videos/video_0", "/v1/models"):
        ingress.ask("GET", path)
    ingress.ask("POST", "/v1/videos", json={})
    assert list(ingress.folder.iterdir()) == []


@pytest.mark.parametrize("form", ["file", "data-url", "image_url", "json", "json-image_url"])
def test_what_goes_in_is_kept_as_a_file(shared: JobsIngress, form: str) -> None:
    video = blank_video(5)
    url = f"data:video/mp4;base64,{base64.b64encode(video).decode()}"
    texts = {"prompt": (None, "waves"), "num_frames": (None, "5")}
    sent: dict[str, Any] = {
        "file": {"files": texts | {"input_reference": ("waves.mp4", video)}},
        "data-url": {"files": texts | {"input_reference": (None, url)}},
        "image_url": {"files": texts | {"input_reference[image_url]": (None, url)}},
        "json": {"json": {"prompt": "waves", "num_frames": 5, "input_reference": url}},
        "json-image_url": {"json": {"prompt": "waves", "num_frames": 5, "input_reference": {"image_url": url}}},
    }[form]
    answer = shared.ask("POST", "/v1/videos", **sent)
    assert answer.status_code == 200, answer.text
    job_id = answer.json()["id"]
    assert shared.files.read(job_id, "input_reference-0") == video
    assert "base64" not in repr(shared.taken(job_id).asked)


def test_one_job_too_many_gets_a_429_with_retry_after(tmp_path: Path) -> None:
    ingress = JobsIngress(tmp_path, max_queued=2)
    first = ingress.create()
    ingress.create()
    answer = ingress.ask("POST", "/v1/videos", json={"prompt": "waves", "num_frames": 5})
    assert "jobs.max_queued" in error_of(answer, 429)["message"]
    assert answer.headers["retry-after"] == "5"
    ingress.taken(first["id"])
    ingress.create()


def test_a_request_that_is_repeated_makes_no_second_job(ingress: JobsIngress) -> None:
    """The proxy repeats a request whose ingress was lost, and clients may repeat theirs: the key identifies it."""

    def post(key: str, owner: str | None = None) -> Any:
        sent = {"prompt": "waves", "num_frames": 5}
        answer = ingress.ask("POST", "/v1/videos", json=sent, owner=owner, headers={"idempotency-key": key})
        assert answer.status_code == 200, answer.text
        return answer.json()

    first = post("a")
    assert post("a") == first
    ingress.complete(first["id"], CONTENT)
    assert post("a")["status"] == "completed"
    others = [post("b")["id"], post("a", "ann")["id"]]
    assert len({first["id"], *others}) == 3
    assert len(ingress.ask("GET", "/v1/videos").json()["data"]) == 2


def test_the_same_key_for_another_request_is_refused(ingress: JobsIngress) -> None:
    """Otherwise the second request would get the job of the first."""
    headers = {"idempotency-key": "a"}
    ingress.ask("POST", "/v1/videos", json={"prompt": "waves", "num_frames": 5}, headers=headers)
    for fields in ({"prompt": "a storm"}, {"num_frames": 9}):
        sent = {"prompt": "waves", "num_frames": 5} | fields
        answer = ingress.ask("POST", "/v1/videos", json=sent, headers=headers)
        assert error_of(answer, 400)["message"].startswith("Idempotency-Key: ")


def test_an_empty_key_is_none(ingress: JobsIngress) -> None:
    made = [
        ingress.ask(
            "POST", "/v1/videos", json={"prompt": prompt, "num_frames": 5}, headers={"idempotency-key": ""}
        )
        for prompt in ("waves", "waves", "sea")
    ]
    assert len({answer.json()["id"] for answer in made}) == 3


def test_a_job_whose_ingress_died_while_it_was_stored_is_stored_by_the_repeat(
    ingress: JobsIngress, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = {"json": {"prompt": "waves", "num_frames": 5}, "headers": {"idempotency-key": "a"}}

    def die(*_: object) -> None:
        raise ConnectionAbortedError

    with monkeypatch.context() as dying:
        dying.setattr(JobStore, "put_in_queue", die)
        error_of(ingress.ask("POST", "/v1/videos", **same), 503)
    assert ingress.ask("GET", "/v1/videos").json()["data"] == []
    made = ingress.ask("POST", "/v1/videos", **same).json()
    assert [each["id"] for each in ingress.ask("GET", "/v1/videos").json()["data"]] == [made["id"]]


@pytest.mark.parametrize("name", ["%00", "video_1%00", "%ff", "a b", "x" * 9999, "..", "%2e%2e%2fjobs.db"])
def test_what_is_no_id_is_the_id_of_no_job(postgresql_url: str, tmp_path: Path, name: str) -> None:
    """PostgreSQL does not accept some of these names in a query."""
    ingress = JobsIngress(tmp_path, database=postgresql_url, files=str(tmp_path / "files"))
    ingress.create()
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content")):
        assert ingress.ask(method, f"/v1/videos/{name}{path}").status_code == 404
    assert ingress.ask("GET", f"/v1/videos?after={name}").json()["data"] == []


def test_where_no_jobs_are_taken_none_are_described(tmp_path: Path) -> None:
    """The page then requests videos from /v1/videos/sync."""
    paths = JobsIngress(tmp_path, max_queued=0).ask("GET", "/openapi.json").json()["paths"]
    assert "post" not in paths["/v1/videos"]
    assert "post" in paths["/v1/videos/sync"]


def test_jobs_can_be_turned_off(tmp_path: Path) -> None:
    answer = JobsIngress(tmp_path, max_queued=0).ask(
        "POST", "/v1/videos", json={"prompt": "waves", "num_frames": 5}
    )
    assert "/v1/videos/sync" in error_of(answer, 400)["message"]
    assert list(tmp_path.iterdir()) == []


def test_a_list_is_in_pages_of_the_owners_own(ingress: JobsIngress) -> None:
    anns = [ingress.create(owner="ann")["id"] for _ in range(3)]
    ingress.create()
    page = ingress.ask("GET", "/v1/videos?limit=2", owner="ann").json()
    assert (page["object"], page["has_more"]) == ("list", True)
    assert (page["first_id"], page["last_id"]) == (anns[2], anns[1])
    rest = ingress.ask("GET", f"/v1/videos?limit=2&after={anns[1]}", owner="ann").json()
    assert ([each["id"] for each in rest["data"]], rest["has_more"]) == ([anns[0]], False)
    ascending = ingress.ask("GET", "/v1/videos?order=asc", owner="ann").json()["data"]
    assert [each["id"] for each in ascending] == anns


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=few", "order=up", "page=2"])
def test_a_wrong_query_is_named(shared: JobsIngress, query: str) -> None:
    assert error_of(shared.ask("GET", f"/v1/videos?{query}"), 400)["param"] == query.partition("=")[0]


@pytest.mark.parametrize(
    ("method", "path"), [("GET", ""), ("DELETE", ""), ("GET", "/content"), ("POST", "/remix")], ids=str
)
def test_a_job_is_its_owners_alone(shared: JobsIngress, method: str, path: str) -> None:
    made = shared.create(owner="ann")
    shared.complete(made["id"], CONTENT)
    for owner in ("bob", None):
        answer = shared.ask(method, f"/v1/videos/{made['id']}{path}", owner=owner, json={"prompt": "sea"})
        assert error_of(answer, 404)["code"] == "job_not_found"
    assert shared.ask("GET", f"/v1/videos/{made['id']}/content", owner="ann").content == CONTENT


def test_a_video_is_no_picture(shared: JobsIngress) -> None:
    made = shared.create()
    error_of(shared.ask("GET", f"/v1/images/jobs/{made['id']}"), 404)


def test_one_that_waits_is_cancelled_by_delete_and_told_of(shared: JobsIngress) -> None:
    made = shared.create()
    deleted = {"id": made["id"], "deleted": True, "object": "video.deleted"}
    assert shared.ask("DELETE", f"/v1/videos/{made['id']}").json() == deleted
    told = shared.ask("GET", f"/v1/videos/{made['id']}").json()
    assert told["status"] == "cancelled"
    assert told["expires_at"] - told["completed_at"] == shared.config.expire_after_s
    assert "is cancelled" in error_of(shared.ask("GET", f"/v1/videos/{made['id']}/content"), 400)["message"]
    assert shared.ask("DELETE", f"/v1/videos/{made['id']}").json() == deleted
    error_of(shared.ask("GET", f"/v1/videos/{made['id']}"), 404)


def test_one_that_has_ended_is_deleted_with_its_files(ingress: JobsIngress) -> None:
    made = ingress.create()
    ingress.complete(made["id"], CONTENT)
    assert ingress.ask("DELETE", f"/v1/videos/{made['id']}").status_code == 200
    error_of(ingress.ask("GET", f"/v1/videos/{made['id']}"), 404)
    error_of(ingress.ask("DELETE", f"/v1/videos/{made['id']}"), 404)
    assert list((ingress.folder / "files").iterdir()) == []


def test_one_that_has_failed_says_why(shared: JobsIngress) -> None:
    made = shared.create()
    job = shared.taken(made["id"])
    with shared.store as store:
        store.end(
            job.id,
            "runner",
            job.beat,
            Ending("failed", (), Failure("out_of_memory", "too large", "size")),
            2e9,
            3e9,
        )
    told = shared.ask("GET", f"/v1/videos/{made['id']}").json()
    assert told["error"] == {"code": "out_of_memory", "message": "too large", "param": "size"}
    assert "too large" in error_of(shared.ask("GET", f"/v1/videos/{made['id']}/content"), 400)["message"]


def test_what_has_expired_is_not_there_though_it_is_not_deleted_yet(
    ingress: JobsIngress, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ingress.create()
    ingress.complete(made["id"], CONTENT)
    monkeypatch.setattr(jobs_module.time, "time", lambda: 3.1e9)
    error_of(ingress.ask("GET", f"/v1/videos/{made['id']}/content"), 404)


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("bytes=0-0", slice(0, 1)),
        ("bytes=100-199", slice(100, 200)),
        ("bytes=100-", slice(100, None)),
        ("bytes=0-", slice(0, None)),
        ("bytes=-100", slice(-100, None)),
        ("bytes=10000-99999999", slice(10000, None)),
        ("bytes=-99999999", slice(0, None)),
    ],
)
def test_a_part_of_the_content_is_answered(shared: JobsIngress, film: str, asked: str, part: slice) -> None:
    answer = shared.ask("GET", film, headers={"range": asked})
    start, end, _ = part.indices(len(CONTENT))
    assert (answer.status_code, answer.content) == (206, CONTENT[part])
    assert answer.headers["content-length"] == str(end - start)
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{len(CONTENT)}"


@pytest.mark.parametrize(
    "asked", ["", "bytes=", "bytes=-", "bytes=5-1", "bytes=0-1,5-9", "lines=1-2", f"bytes=0-{'9' * 5000}"]
)
def test_a_range_that_is_none_answers_with_the_whole(shared: JobsIngress, film: str, asked: str) -> None:
    answer = shared.ask("GET", f"{film}?variant=video", headers={"range": asked})
    assert (answer.status_code, answer.content) == (200, CONTENT)
    assert (answer.headers["content-type"], answer.headers["accept-ranges"]) == ("video/mp4", "bytes")


@pytest.mark.parametrize("asked", [f"bytes={len(CONTENT)}-", "bytes=-0"])
def test_a_range_outside_of_the_content_is_a_416(shared: JobsIngress, film: str, asked: str) -> None:
    answer = shared.ask("GET", film, headers={"range": asked})
    error_of(answer, 416)
    assert answer.headers["content-range"] == f"bytes */{len(CONTENT)}"


def test_a_part_of_another_file_is_not_answered(shared: JobsIngress, film: str) -> None:
    part = {"range": "bytes=0-9"}
    etag = shared.ask("GET", film).headers["etag"]
    assert shared.ask("GET", film, headers=part | {"if-range": etag}).status_code == 206
    assert shared.ask("GET", film, headers=part | {"if-range": '"other"'}).status_code == 200


def test_a_file_that_is_gone_is_an_error_and_no_empty_answer(ingress: JobsIngress) -> None:
    made = ingress.create()
    ingress.complete(made["id"], CONTENT)
    ingress.files.remove(made["id"])
    assert "no longer exists" in error_of(ingress.ask("GET", f"/v1/videos/{made['id']}/content"), 500)["message"]


def test_what_goes_in_and_cannot_be_stored_leaves_no_job(ingress: JobsIngress) -> None:
    ingress.create()
    folder = ingress.folder / "files"
    folder.rename(ingress.folder / "elsewhere")
    folder.touch()
    error_of(ingress.ask("POST", "/v1/videos", json={"prompt": "waves", "num_frames": 5}), 503)
    assert len(ingress.ask("GET", "/v1/videos").json()["data"]) == 1


def test_what_could_only_be_stored_in_part_leaves_nothing(
    ingress: JobsIngress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full."""

    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(JobFiles, "write", fill)
        video = {"input_reference": ("waves.mp4", blank_video(5))}
        error_of(ingress.ask("POST", "/v1/videos", data={"prompt": "waves"}, files=video), 503)
    assert list((ingress.folder / "files").iterdir()) == []
    ingress.create()


def test_a_database_that_is_deleted_while_it_is_served_is_made_anew(ingress: JobsIngress) -> None:
    """Jobs written to the deleted file would be lost when the process ends."""
    ingress.create()
    for file in ingress.folder.glob("jobs.db*"):
        file.unlink()
    made = ingress.create()
    with ingress.store as store:
        assert store.get(made["id"], "video", None) is not None


def test_a_spritesheet_is_refused(shared: JobsIngress, film: str) -> None:
    assert error_of(shared.ask("GET", f"{film}?variant=spritesheet"), 400)["param"] == "variant"


def test_a_video_of_before_there_were_thumbnails_has_none(shared: JobsIngress, film: str) -> None:
    assert "no thumbnail" in error_of(shared.ask("GET", f"{film}?variant=thumbnail"), 400)["message"]


def test_head_tells_of_the_content_and_reads_none_of_it(
    shared: JobsIngress, film: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(JobFiles, "pieces")
    for headers, status, num_bytes in (({}, 200, len(CONTENT)), ({"range": "bytes=0-9"}, 206, 10)):
        answer = shared.ask("HEAD", film, headers=headers)
        assert (answer.status_code, answer.content) == (status, b"")
        assert answer.headers["content-length"] == str(num_bytes)
        assert answer.headers["content-type"] == "video/mp4"


def test_content_that_is_not_there_yet_is_a_400_that_says_so(shared: JobsIngress) -> None:
    """The status is not 409, because OpenAI's client would repeat the request."""
    made = shared.create()
    answer = shared.ask("GET", f"/v1/videos/{made['id']}/content")
    assert "is queued" in error_of(answer, 400)["message"]


def test_a_remix_draws_the_video_anew(shared: JobsIngress) -> None:
    made, video = shared.create(size="64x48", guidance_scale=3.0, seed=5), blank_video(5)
    shared.complete(made["id"], video)
    answer = shared.ask("POST", f"/v1/videos/{made['id']}/remix", json={"prompt": "a storm"})
    assert answer.status_code == 200, answer.text
    remix = answer.json()
    assert (remix["status"], remix["remixed_from_video_id"]) == ("queued", made["id"])
    assert (remix["prompt"], remix["size"], remix["num_frames"]) == ("a storm", "64x48", 5)
    asked = shared.taken(remix["id"]).asked
    assert asked.fields["guidance_scale"] == 3.0
    assert shared.files.read(remix["id"], "input_reference-0") == video


@pytest.mark.parametrize("fields", [{}, {"prompt": ""}, {"prompt": "sea", "input_reference": "x"}])
def test_a_remix_takes_a_prompt_and_no_other_video(shared: JobsIngress, fields: dict[str, Any]) -> None:
    made = shared.create()
    shared.complete(made["id"], blank_video(5))
    answer = shared.ask("POST", f"/v1/videos/{made['id']}/remix", json=fields)
    assert error_of(answer, 400)["param"] == ("input_reference" if "input_reference" in fields else "prompt")


def test_only_what_is_completed_is_remixed(shared: JobsIngress) -> None:
    made = shared.create()
    answer = shared.ask("POST", f"/v1/videos/{made['id']}/remix", json={"prompt": "sea"})
    assert "is queued" in error_of(answer, 400)["message"]


def test_a_model_that_makes_no_videos_of_videos_remixes_none(ingress: JobsIngress) -> None:
    made = ingress.create()
    ingress.complete(made["id"], CONTENT)
    card = ingress.relay.model()
    card.calls.pop("video_to_video")
    ingress.relay.model = lambda: card  # type: ignore[method-assign]
    answer = ingress.ask("POST", f"/v1/videos/{made['id']}/remix", json={"prompt": "sea"})
    assert "does not redraw videos" in error_of(answer, 400)["message"]


def test_pictures_are_made_in_the_background_where_that_is_asked_for(tmp_path: Path) -> None:
    ingress = JobsIngress(tmp_path, "flux")
    fields = {"prompt": "a cat", "n": 2, "output_format": "webp", "background": True}
    answer = ingress.ask("POST", "/v1/images/generations", json=fields)
    assert answer.status_code == 202
    made = answer.json()
    assert (made["object"], made["status"], made["n"], made["data"]) == ("image.job", "queued", 2, [])
    ingress.complete(made["id"], b"first", b"second", media_type="image/webp")
    path = f"/v1/images/jobs/{made['id']}"
    told = ingress.ask("GET", path).json()
    assert (told["status"], len(told["data"]), told["data"][0]["seed"]) == ("completed", 2, 7)
    assert [ingress.ask("GET", f"{path}/content?index={i}").content for i in range(2)] == [b"first", b"second"]
    assert error_of(ingress.ask("GET", f"{path}/content?index=2"), 400)["param"] == "index"
    assert [each["id"] for each in ingress.ask("GET", "/v1/images/jobs").json()["data"]] == [made["id"]]


@pytest.mark.parametrize(("text", "flag"), [("true", True), ("false", False), ("opaque", "opaque")])
def test_a_form_says_background_by_a_text(text: str, flag: object) -> None:
    assert parse_body(EditBody, {"prompt": "a cat", "background": text}).background is flag


@pytest.mark.parametrize("value", ["transparent", "yes", 1, 0])
def test_any_other_background_is_refused(value: object) -> None:
    with pytest.raises(BadRequest, match="background: "):
        parse_body(ImageBody, {"prompt": "a cat", "background": value}, is_json=True)


def test_what_is_streamed_is_not_made_in_the_background(tmp_path: Path) -> None:
    body = {"prompt": "a cat", "background": True, "stream": True}
    answer = JobsIngress(tmp_path, "flux").ask("POST", "/v1/images/generations", json=body)
    assert error_of(answer, 400)["param"] == "background"


def test_a_model_of_pictures_makes_no_video(tmp_path: Path) -> None:
    answer = JobsIngress(tmp_path, "flux").ask("POST", "/v1/videos", json={"prompt": "waves"})
    assert "/v1/images/generations" in error_of(answer, 400)["message"]
    assert list(tmp_path.iterdir()) == []

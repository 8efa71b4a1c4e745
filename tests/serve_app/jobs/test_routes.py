"""Jobs over HTTP, without anybody who draws them."""

import base64
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.errors import BadRequest
from serve_app.fields import parse_body
from serve_app.input_videos import blank_video
from serve_app.jobs import jobs as jobs_module
from serve_app.jobs.job import Ending, Failure
from serve_app.jobs.store import JobStore
from serve_app.openai_api import EditBody, ImageBody
from tests.serve_app.jobs.desks import Desk

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """For tests that leave nothing behind."""
    return Desk(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def film(shared: Desk) -> str:
    """Path of the content of a job that is completed."""
    made = shared.create()
    shared.complete(made["id"], CONTENT)
    return f"/v1/videos/{made['id']}/content"


def error_of(answer: httpx.Response, status: int) -> Any:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def test_a_video_is_queued_with_what_it_will_be(desk: Desk) -> None:
    made = desk.create(size="64x48", seconds=0.5, num_frames=None, fps=8, seed=3)
    assert (made["object"], made["status"], made["progress"]) == ("video", "queued", 0)
    assert (made["size"], made["seconds"], made["num_frames"], made["fps"]) == ("64x48", "0.625", 5, 8)
    assert (made["model"], made["prompt"], made["seed"]) == ("tiny-wan", "waves", 3)
    assert made["error"] is made["completed_at"] is made["expires_at"] is made["remixed_from_video_id"] is None
    assert desk.ask("GET", f"/v1/videos/{made['id']}").json() == made


def test_a_seed_that_was_drawn_is_kept(shared: Desk) -> None:
    """However often it is drawn, it is the same video."""
    made = shared.create()
    assert shared.taken(made["id"]).asked.fields["seed"] == made["seed"]


@pytest.mark.parametrize("fields", [{"num_frames": 6}, {"colour": "red"}, {"size": "64x72"}, {"prompt": ""}])
def test_what_is_wrong_is_told_before_there_is_a_job(desk: Desk, fields: dict[str, Any]) -> None:
    answer = desk.ask("POST", "/v1/videos", json={"prompt": "waves"} | fields)
    assert error_of(answer, 400)["param"] in fields
    assert desk.ask("GET", "/v1/videos").json()["data"] == []


def test_no_file_is_made_until_there_is_a_job(desk: Desk) -> None:
    for path in ("/v1/videos", "/v1/videos/video_0", "/v1/models"):
        desk.ask("GET", path)
    desk.ask("POST", "/v1/videos", json={})
    assert list(desk.folder.iterdir()) == []


@pytest.mark.parametrize("form", ["file", "data-url", "image_url", "json", "json-image_url"])
def test_what_goes_in_is_kept_as_a_file(shared: Desk, form: str) -> None:
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
    desk = Desk(tmp_path, max_queued=2)
    first = desk.create()
    desk.create()
    answer = desk.ask("POST", "/v1/videos", json={"prompt": "waves", "num_frames": 5})
    assert "jobs.max_queued" in error_of(answer, 429)["message"]
    assert answer.headers["retry-after"] == "5"
    desk.taken(first["id"])
    desk.create()


def test_a_request_that_is_repeated_makes_no_second_job(desk: Desk) -> None:
    """By the proxy, whose ingress was lost, or by the client: the key says that it is the same."""

    def post(key: str, owner: str | None = None) -> Any:
        sent = {"prompt": "waves", "num_frames": 5}
        answer = desk.ask("POST", "/v1/videos", json=sent, owner=owner, headers={"idempotency-key": key})
        assert answer.status_code == 200, answer.text
        return answer.json()

    first = post("a")
    assert post("a") == first
    desk.complete(first["id"], CONTENT)
    assert post("a")["status"] == "completed"
    others = [post("b")["id"], post("a", "ann")["id"]]
    assert len({first["id"], *others}) == 3
    assert len(desk.ask("GET", "/v1/videos").json()["data"]) == 2


def test_a_job_whose_ingress_died_while_it_was_stored_is_stored_by_the_repeat(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = {"json": {"prompt": "waves", "num_frames": 5}, "headers": {"idempotency-key": "a"}}

    def die(*_: object) -> None:
        raise ConnectionAbortedError

    with monkeypatch.context() as dying:
        dying.setattr(JobStore, "put_in_queue", die)
        error_of(desk.ask("POST", "/v1/videos", **same), 503)
    assert desk.ask("GET", "/v1/videos").json()["data"] == []
    made = desk.ask("POST", "/v1/videos", **same).json()
    assert [each["id"] for each in desk.ask("GET", "/v1/videos").json()["data"]] == [made["id"]]


def test_jobs_can_be_turned_off(tmp_path: Path) -> None:
    answer = Desk(tmp_path, max_queued=0).ask("POST", "/v1/videos", json={"prompt": "waves", "num_frames": 5})
    assert "/v1/videos/sync" in error_of(answer, 400)["message"]
    assert list(tmp_path.iterdir()) == []


def test_a_list_is_in_pages_of_the_owners_own(desk: Desk) -> None:
    anns = [desk.create(owner="ann")["id"] for _ in range(3)]
    desk.create()
    page = desk.ask("GET", "/v1/videos?limit=2", owner="ann").json()
    assert (page["object"], page["has_more"]) == ("list", True)
    assert (page["first_id"], page["last_id"]) == (anns[2], anns[1])
    rest = desk.ask("GET", f"/v1/videos?limit=2&after={anns[1]}", owner="ann").json()
    assert ([each["id"] for each in rest["data"]], rest["has_more"]) == ([anns[0]], False)
    ascending = desk.ask("GET", "/v1/videos?order=asc", owner="ann").json()["data"]
    assert [each["id"] for each in ascending] == anns


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=few", "order=up", "page=2"])
def test_a_wrong_query_is_named(shared: Desk, query: str) -> None:
    assert error_of(shared.ask("GET", f"/v1/videos?{query}"), 400)["param"] == query.partition("=")[0]


@pytest.mark.parametrize(
    ("method", "path"), [("GET", ""), ("DELETE", ""), ("GET", "/content"), ("POST", "/remix")], ids=str
)
def test_a_job_is_its_owners_alone(shared: Desk, method: str, path: str) -> None:
    made = shared.create(owner="ann")
    shared.complete(made["id"], CONTENT)
    for owner in ("bob", None):
        answer = shared.ask(method, f"/v1/videos/{made['id']}{path}", owner=owner, json={"prompt": "sea"})
        assert error_of(answer, 404)["code"] == "job_not_found"
    assert shared.ask("GET", f"/v1/videos/{made['id']}/content", owner="ann").content == CONTENT


def test_a_video_is_no_picture(shared: Desk) -> None:
    made = shared.create()
    error_of(shared.ask("GET", f"/v1/images/jobs/{made['id']}"), 404)


def test_one_that_waits_is_cancelled_by_delete_and_told_of(shared: Desk) -> None:
    made = shared.create()
    deleted = {"id": made["id"], "deleted": True, "object": "video.deleted"}
    assert shared.ask("DELETE", f"/v1/videos/{made['id']}").json() == deleted
    told = shared.ask("GET", f"/v1/videos/{made['id']}").json()
    assert told["status"] == "cancelled"
    assert told["expires_at"] - told["completed_at"] == shared.config.expire_after_s
    assert "is cancelled" in error_of(shared.ask("GET", f"/v1/videos/{made['id']}/content"), 400)["message"]
    assert shared.ask("DELETE", f"/v1/videos/{made['id']}").json() == deleted
    error_of(shared.ask("GET", f"/v1/videos/{made['id']}"), 404)


def test_one_that_has_ended_is_deleted_with_its_files(desk: Desk) -> None:
    made = desk.create()
    desk.complete(made["id"], CONTENT)
    assert desk.ask("DELETE", f"/v1/videos/{made['id']}").status_code == 200
    error_of(desk.ask("GET", f"/v1/videos/{made['id']}"), 404)
    error_of(desk.ask("DELETE", f"/v1/videos/{made['id']}"), 404)
    assert list((desk.folder / "files").iterdir()) == []


def test_one_that_has_failed_says_why(shared: Desk) -> None:
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
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = desk.create()
    desk.complete(made["id"], CONTENT)
    monkeypatch.setattr(jobs_module.time, "time", lambda: 3.1e9)
    error_of(desk.ask("GET", f"/v1/videos/{made['id']}/content"), 404)


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
def test_a_part_of_the_content_is_answered(shared: Desk, film: str, asked: str, part: slice) -> None:
    answer = shared.ask("GET", film, headers={"range": asked})
    start, end, _ = part.indices(len(CONTENT))
    assert (answer.status_code, answer.content) == (206, CONTENT[part])
    assert answer.headers["content-length"] == str(end - start)
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{len(CONTENT)}"


@pytest.mark.parametrize(
    "asked", ["", "bytes=", "bytes=-", "bytes=5-1", "bytes=0-1,5-9", "lines=1-2", f"bytes=0-{'9' * 5000}"]
)
def test_a_range_that_is_none_answers_with_the_whole(shared: Desk, film: str, asked: str) -> None:
    answer = shared.ask("GET", f"{film}?variant=video", headers={"range": asked})
    assert (answer.status_code, answer.content) == (200, CONTENT)
    assert (answer.headers["content-type"], answer.headers["accept-ranges"]) == ("video/mp4", "bytes")


@pytest.mark.parametrize("asked", [f"bytes={len(CONTENT)}-", "bytes=-0"])
def test_a_range_outside_of_the_content_is_a_416(shared: Desk, film: str, asked: str) -> None:
    answer = shared.ask("GET", film, headers={"range": asked})
    error_of(answer, 416)
    assert answer.headers["content-range"] == f"bytes */{len(CONTENT)}"


def test_a_part_of_another_file_is_not_answered(shared: Desk, film: str) -> None:
    part = {"range": "bytes=0-9"}
    etag = shared.ask("GET", film).headers["etag"]
    assert shared.ask("GET", film, headers=part | {"if-range": etag}).status_code == 206
    assert shared.ask("GET", film, headers=part | {"if-range": '"other"'}).status_code == 200


def test_a_file_that_is_gone_is_an_error_and_no_empty_answer(desk: Desk) -> None:
    made = desk.create()
    desk.complete(made["id"], CONTENT)
    desk.files.remove(made["id"])
    assert "not there any more" in error_of(desk.ask("GET", f"/v1/videos/{made['id']}/content"), 500)["message"]


def test_what_goes_in_and_cannot_be_stored_leaves_no_job(desk: Desk) -> None:
    desk.create()
    folder = desk.folder / "files"
    folder.rename(desk.folder / "elsewhere")
    folder.touch()
    error_of(desk.ask("POST", "/v1/videos", json={"prompt": "waves", "num_frames": 5}), 503)
    assert len(desk.ask("GET", "/v1/videos").json()["data"]) == 1


def test_a_thumbnail_is_refused(shared: Desk, film: str) -> None:
    assert error_of(shared.ask("GET", f"{film}?variant=thumbnail"), 400)["param"] == "variant"


def test_content_that_is_not_there_yet_is_a_400_that_says_so(shared: Desk) -> None:
    """No 409, which OpenAI's client would repeat."""
    made = shared.create()
    answer = shared.ask("GET", f"/v1/videos/{made['id']}/content")
    assert "is queued" in error_of(answer, 400)["message"]


def test_a_remix_draws_the_video_anew(shared: Desk) -> None:
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
def test_a_remix_takes_a_prompt_and_no_other_video(shared: Desk, fields: dict[str, Any]) -> None:
    made = shared.create()
    shared.complete(made["id"], blank_video(5))
    answer = shared.ask("POST", f"/v1/videos/{made['id']}/remix", json=fields)
    assert error_of(answer, 400)["param"] == ("input_reference" if "input_reference" in fields else "prompt")


def test_only_what_is_completed_is_remixed(shared: Desk) -> None:
    made = shared.create()
    answer = shared.ask("POST", f"/v1/videos/{made['id']}/remix", json={"prompt": "sea"})
    assert "is queued" in error_of(answer, 400)["message"]


def test_a_model_that_makes_no_videos_of_videos_remixes_none(desk: Desk) -> None:
    made = desk.create()
    desk.complete(made["id"], CONTENT)
    card = desk.relay.model()
    card.calls.pop("video_to_video")
    desk.relay.model = lambda: card  # type: ignore[method-assign]
    answer = desk.ask("POST", f"/v1/videos/{made['id']}/remix", json={"prompt": "sea"})
    assert "makes no videos of videos" in error_of(answer, 400)["message"]


def test_pictures_are_made_in_the_background_where_that_is_asked_for(tmp_path: Path) -> None:
    desk = Desk(tmp_path, "flux")
    fields = {"prompt": "a cat", "n": 2, "output_format": "webp", "background": True}
    answer = desk.ask("POST", "/v1/images/generations", json=fields)
    assert answer.status_code == 202
    made = answer.json()
    assert (made["object"], made["status"], made["n"], made["data"]) == ("image.job", "queued", 2, [])
    desk.complete(made["id"], b"first", b"second", media_type="image/webp")
    path = f"/v1/images/jobs/{made['id']}"
    told = desk.ask("GET", path).json()
    assert (told["status"], len(told["data"]), told["data"][0]["seed"]) == ("completed", 2, 7)
    assert [desk.ask("GET", f"{path}/content?index={i}").content for i in range(2)] == [b"first", b"second"]
    assert error_of(desk.ask("GET", f"{path}/content?index=2"), 400)["param"] == "index"
    assert [each["id"] for each in desk.ask("GET", "/v1/images/jobs").json()["data"]] == [made["id"]]


@pytest.mark.parametrize(("text", "flag"), [("true", True), ("false", False), ("opaque", "opaque")])
def test_a_form_says_background_by_a_text(text: str, flag: object) -> None:
    assert parse_body(EditBody, {"prompt": "a cat", "background": text}).background is flag


@pytest.mark.parametrize("value", ["transparent", "yes", 1, 0])
def test_any_other_background_is_refused(value: object) -> None:
    with pytest.raises(BadRequest, match="background: "):
        parse_body(ImageBody, {"prompt": "a cat", "background": value}, is_json=True)


def test_what_is_streamed_is_not_made_in_the_background(tmp_path: Path) -> None:
    body = {"prompt": "a cat", "background": True, "stream": True}
    answer = Desk(tmp_path, "flux").ask("POST", "/v1/images/generations", json=body)
    assert error_of(answer, 400)["param"] == "background"


def test_a_model_of_pictures_makes_no_video(tmp_path: Path) -> None:
    answer = Desk(tmp_path, "flux").ask("POST", "/v1/videos", json={"prompt": "waves"})
    assert "/v1/images/generations" in error_of(answer, 400)["message"]
    assert list(tmp_path.iterdir()) == []

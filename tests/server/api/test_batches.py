"""Files and batches: what is taken, told and written; that a killed process loses no line."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gevent
import openai
import pytest
from flask import Flask
from flask.testing import FlaskClient

from doubles.scripted_client import ScriptedClient
from enginehouse.runtime.request import GIVES_WAY
from enginehouse.server.api.batches.folder import Folder
from enginehouse.server.api.batches.journal import Journal
from enginehouse.server.api.batches.new_batch import new_batch
from enginehouse.server.api.batches.routes import run_batches
from enginehouse.server.api_keys import read_keys
from enginehouse.server.app import create_app
from enginehouse.server.http.processes import own_mark, runs
from enginehouse.server.settings import ServerSettings
from makers.api_client import error_of
from makers.judges import served
from makers.token_outputs import tokens

CHAT = "/v1/chat/completions"
HELLO = {"model": "tiny/chat", "messages": [{"role": "user", "content": "hello"}]}


def line(custom_id: str, url: str = CHAT, method: str = "POST", **body: Any) -> str:
    asked = {"custom_id": custom_id, "method": method, "url": url, "body": {**HELLO, **body}}
    return json.dumps(asked)


@pytest.fixture
def app(settings: ServerSettings, engine: ScriptedClient, tmp_path: Path) -> Flask:
    given = dataclasses.replace(settings, files_dir=tmp_path / "files", max_file_bytes=50_000)
    return create_app(given, engine)


@pytest.fixture
def http(app: Flask) -> FlaskClient:
    return app.test_client()


def upload(http: FlaskClient, text: str, purpose: str = "batch", **headers: str) -> Any:
    form = {"purpose": purpose, "file": (io.BytesIO(text.encode()), "in.jsonl")}
    return http.post("/v1/files", data=form, headers=headers)


def begin(http: FlaskClient, text: str, endpoint: str = CHAT, **fields: Any) -> Any:
    file_id = upload(http, text).json["id"]
    body = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": "24h", **fields}
    response = http.post("/v1/batches", json=body)
    assert response.status_code == 200, response.json
    return response.json


def ended(app: Flask, http: FlaskClient, batch_id: str) -> Any:
    running = gevent.spawn(run_batches, app)
    ends = ("completed", "failed", "cancelled", "expired")
    with gevent.Timeout(20):
        while (told := http.get(f"/v1/batches/{batch_id}").json)["status"] not in ends:
            gevent.sleep(0.02)
    running.kill()
    return told


def content(http: FlaskClient, file_id: str) -> list[dict[str, Any]]:
    text = http.get(f"/v1/files/{file_id}/content").text
    return [json.loads(each) for each in text.splitlines()]


def test_a_file_is_kept_listed_read_and_deleted(http: FlaskClient) -> None:
    made = upload(http, "abc\n").json
    path = f"/v1/files/{made['id']}"
    assert (made["bytes"], made["filename"], made["purpose"]) == (4, "in.jsonl", "batch")
    assert http.get(path).json == made
    other = upload(http, "def").json
    assert http.get("/v1/files").json["data"] == [other, made]
    assert http.get("/v1/files?limit=1&order=asc").json["data"] == [made]
    assert http.get("/v1/files?purpose=batch_output").json["data"] == []
    assert http.get(f"{path}/content").data == b"abc\n"
    assert http.delete(path).json == {"id": made["id"], "object": "file", "deleted": True}
    for asked in (path, f"{path}/content"):
        assert (http.get(asked).status_code, error_of(http.get(asked))["code"]) == (
            404,
            "file_not_found",
        )


def test_what_nobody_knows_of_an_upload_is_named(http: FlaskClient) -> None:
    form = {"purpose": "batch", "colour": "red", "file": (io.BytesIO(b"x"), "in.jsonl")}
    told = http.post("/v1/files", data=form, content_type="multipart/form-data")
    assert (told.status_code, told.headers["X-Ignored-Fields"]) == (200, "colour")
    nothing = http.post("/v1/files", data={}, content_type="multipart/form-data; boundary=x")
    assert error_of(nothing)["message"] == 'purpose: missing; wanted "batch"'


def test_a_part_of_an_upload_without_a_name_is_passed_over(http: FlaskClient) -> None:
    named = 'name="purpose"\r\n\r\nbatch', 'name="file"; filename="in.jsonl"\r\n\r\nx'
    parts = [f"--b\r\nContent-Disposition: form-data; {part}\r\n" for part in named]
    parts.append("--b\r\nContent-Disposition: form-data\r\n\r\nwhat\r\n--b--\r\n")
    content_type = "multipart/form-data; boundary=b"
    told = http.post("/v1/files", data="".join(parts).encode(), content_type=content_type)
    assert told.status_code == 200, told.json


def test_a_file_that_cannot_be_taken_leaves_nothing(
    app: Flask, http: FlaskClient, tmp_path: Path
) -> None:
    before = {path.name for path in (tmp_path / "files").iterdir()}
    assert error_of(upload(http, "x", purpose="fine-tune"))["param"] == "purpose"
    assert upload(http, "x" * 60_000).status_code == 413
    assert upload(http, "x" * 200_000).status_code == 413
    form = {"data": {"purpose": "batch"}, "content_type": "multipart/form-data"}
    assert error_of(http.post("/v1/files", **form))["param"] == "file"  # type: ignore[arg-type]
    assert http.post("/v1/files", json={}).status_code == 415
    Folder(tmp_path / "files", 10).check_room(10)
    small = dataclasses.replace(
        app.extensions["enginehouse"].settings, files_dir=tmp_path / "small", max_files_bytes=5
    )
    full = create_app(small, ScriptedClient(None)).test_client()  # type: ignore[arg-type]
    assert error_of(upload(full, "abcdef"))["code"] == "no_room_for_file"
    assert {path.name for path in (tmp_path / "files").iterdir()} == before
    assert not [path for path in (tmp_path / "small").iterdir() if "part" in path.name]


def test_every_line_is_answered_or_told_what_is_wrong_with_it(
    app: Flask, http: FlaskClient, engine: ScriptedClient
) -> None:
    lines = [
        line("a"),
        "no json",
        line("b", temperature=3),
        "",
        line("c", url="/v1/completions"),
        line("a"),
        line("d", stream=True),
        line("e", method="GET"),
        line("f", model="other"),
        line("g", priority=5),
        line("h", priority=-7),
        line("i", priority="x"),
        line("j", background=True),
        '{"custom_id": "k"}',
    ]
    made = begin(http, "\n".join(lines), metadata={"x": "y"})
    assert made["status"] == "validating" and made["metadata"] == {"x": "y"}
    told = ended(app, http, made["id"])
    assert told["status"] == "completed"
    assert told["request_counts"] == {"total": 13, "completed": 3, "failed": 10}
    answers = content(http, told["output_file_id"])
    assert [answer["custom_id"] for answer in answers] == ["a", "g", "h"]
    bodies = [answer["response"]["body"] for answer in answers]
    assert [b["choices"][0]["message"]["content"] for b in bodies] == ["the lazy dog"] * 3
    usual = GIVES_WAY + GIVES_WAY // 2
    assert sorted(engine.priorities) == [usual - 7, usual, usual + 5]
    assert told["usage"]["output_tokens"] == sum(b["usage"]["completion_tokens"] for b in bodies)
    assert told["usage"]["estimated_cost"] > 0
    errors = content(http, told["error_file_id"])
    numbers = [error["error"] and error["error"]["line"] for error in errors]
    assert numbers == [2, None, 5, 6, 7, 8, None, None, 13, 14]
    names = [None, "b", "c", "a", "d", "e", "f", "i", "j", "k"]
    assert [error["custom_id"] for error in errors] == names
    statuses = [error["response"] and error["response"]["status_code"] for error in errors]
    assert statuses == [None, 400, None, None, None, None, 404, 400, None, None]
    assert "line 1" in errors[3]["error"]["message"]


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/embeddings", {"input": ["hi", "dog"]}),
    ],
)
def test_other_endpoints_are_asked_too(
    app: Flask, http: FlaskClient, engine: ScriptedClient, endpoint: str, body: dict[str, Any]
) -> None:
    asked = {"custom_id": "a", "method": "POST", "url": endpoint, "body": body}
    asked["body"] = {"model": "tiny/chat", **body}
    told = ended(app, http, begin(http, json.dumps(asked), endpoint)["id"])
    assert told["request_counts"]["completed"] == 1 and told["usage"]["input_tokens"] > 0
    assert set(engine.priorities) == {GIVES_WAY + GIVES_WAY // 2}


def test_an_engine_that_is_not_there_is_waited_for(
    app: Flask, http: FlaskClient, engine: ScriptedClient
) -> None:
    engine.ready = False
    made = begin(http, line("a"))
    running = gevent.spawn(run_batches, app)
    gevent.sleep(0.3)
    engine.ready = True
    with gevent.Timeout(20):
        while http.get(f"/v1/batches/{made['id']}").json["status"] != "completed":
            gevent.sleep(0.02)
    running.kill()


def test_a_disk_that_is_full_is_waited_for(
    app: Flask, http: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, failures = Journal.put_answer, [OSError("disk full"), OSError("disk full")]

    def full(self: Journal, *given: Any, **more: Any) -> bool:
        if failures:
            raise failures.pop()
        return put(self, *given, **more)

    monkeypatch.setattr(Journal, "put_answer", full)
    told = ended(app, http, begin(http, f"{line('a')}\nno json")["id"])
    assert told["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    update, failures[:] = Journal.update, [OSError("disk full")]

    def full_again(self: Journal, *given: Any) -> None:
        if failures:
            raise failures.pop()
        update(self, *given)

    monkeypatch.setattr(Journal, "update", full_again)
    assert ended(app, http, begin(http, line("a"))["id"])["status"] == "completed"


def test_a_line_on_which_the_server_itself_fails_has_an_error(
    app: Flask, http: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = "enginehouse.server.api.batches.runner.run_wsgi_app"
    monkeypatch.setattr(asked, lambda *given, **more: 1 // 0)
    told = ended(app, http, begin(http, line("a"))["id"])
    [error] = content(http, told["error_file_id"])
    assert error["error"]["code"] == "server_error" and told["request_counts"]["failed"] == 1


def test_a_batch_is_cancelled_with_what_it_has(
    app: Flask, http: FlaskClient, engine: ScriptedClient
) -> None:
    engine.script = tokens("the")  # and then silence
    made = begin(http, line("a"))
    running = gevent.spawn(run_batches, app)
    with gevent.Timeout(10):
        while not engine.generations:
            gevent.sleep(0.02)
    assert http.post(f"/v1/batches/{made['id']}/cancel").json["status"] == "cancelling"
    with gevent.Timeout(10):
        while (told := http.get(f"/v1/batches/{made['id']}").json)["status"] != "cancelled":
            gevent.sleep(0.02)
    running.kill()
    assert told["output_file_id"] is None and told["cancelled_at"]
    assert engine.generations[0].cancels == [None]
    assert http.post(f"/v1/batches/{made['id']}/cancel").json == told


def test_a_file_that_a_batch_reads_is_not_deleted(app: Flask, http: FlaskClient) -> None:
    made = begin(http, line("a"))
    path = f"/v1/files/{made['input_file_id']}"
    refused = http.delete(path)
    assert refused.status_code == 400 and refused.json["error"]["code"] == "file_in_use"
    assert made["id"] in refused.json["error"]["message"]
    assert ended(app, http, made["id"])["status"] == "completed"
    assert http.delete(path).status_code == 200


def test_a_batch_whose_file_is_gone_tells_what_was_answered(
    app: Flask, http: FlaskClient, settings: ServerSettings, tmp_path: Path
) -> None:
    made = begin(http, line("a") + "\n" + line("b"))
    runner = app.extensions["enginehouse.batches"]
    batch = runner._journal.claim(())
    told = {"id": "x", "custom_id": "a", "response": None, "error": None}
    runner._journal.put_answer(batch, 1, told, False)
    (tmp_path / "files" / made["input_file_id"]).unlink()
    failed = ended(app, http, made["id"])
    assert failed["status"] == "failed" and failed["request_counts"]["completed"] == 1
    assert content(http, failed["output_file_id"]) == [told]
    assert failed["errors"]["data"][0]["message"] == "the input file was deleted"


def test_a_batch_is_worked_on_once_at_a_time(http: FlaskClient, tmp_path: Path) -> None:
    journal, made = Journal(Folder(tmp_path / "files", 10**9)), begin(http, line("a"))
    batch = journal.claim(())
    assert batch is not None and batch.id == made["id"]
    for over_at in (None, made["expires_at"]):
        assert journal.claim({batch.id}, over_at) is None
    assert journal.claim((), made["expires_at"] - 1) is None
    assert journal.claim((), made["expires_at"]) is not None  # which failed, and is begun again
    journal.ask_to_cancel(batch, 5)
    assert journal.claim((), 0) is not None


def test_a_batch_behind_another_is_cancelled_and_expires(
    app: Flask, http: FlaskClient, engine: ScriptedClient
) -> None:
    engine.script = []  # the first is never answered
    first, second = begin(http, line("a")), begin(http, line("b"))
    running = gevent.spawn(run_batches, app)
    with gevent.Timeout(20):
        while not engine.submitted:
            gevent.sleep(0.02)
        asked = http.post(f"/v1/batches/{second['id']}/cancel").json
        assert asked["status"] == "cancelling" and asked["cancelling_at"] is not None
        while (told := http.get(f"/v1/batches/{second['id']}").json)["status"] != "cancelled":
            gevent.sleep(0.02)
    assert told["cancelling_at"] == asked["cancelling_at"] <= told["cancelled_at"]
    assert http.get(f"/v1/batches/{first['id']}").json["status"] == "in_progress"
    running.kill()


def test_what_is_not_answered_in_time_has_expired(
    app: Flask, http: FlaskClient, tmp_path: Path
) -> None:
    folder = Folder(tmp_path / "files", 10**6)
    source = tmp_path / "files" / "x.part"
    source.write_text(f"{line('a')}\n{line('b')}\n")
    file = folder.add(source, "", "in.jsonl", "batch", 7)
    made = new_batch(file.id, CHAT, "1m", {}, int(time.time()) - 61, "tiny/chat")
    Journal(folder).add("", made)
    told = ended(app, http, made["id"])
    assert told["status"] == "expired" and told["request_counts"]["failed"] == 2
    errors = content(http, told["error_file_id"])
    assert [error["error"]["code"] for error in errors] == ["batch_expired"] * 2


def test_a_batch_without_its_file_or_a_line_fails(
    app: Flask, http: FlaskClient, tmp_path: Path
) -> None:
    empty, gone = begin(http, "\n\n"), begin(http, line("a"))
    (tmp_path / "files" / gone["input_file_id"]).unlink()
    for made, words in ((empty, "no line"), (gone, "deleted")):
        told = ended(app, http, made["id"])
        assert told["status"] == "failed" and words in told["errors"]["data"][0]["message"]
    assert [b["id"] for b in http.get("/v1/batches").json["data"]] == [gone["id"], empty["id"]]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"input_file_id": "file_none"}, 404, "input_file_id"),
        ({"endpoint": "/v1/messages"}, 400, "endpoint"),
        ({"completion_window": "soon"}, 400, "completion_window"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(
    http: FlaskClient, fields: dict[str, Any], status: int, param: str
) -> None:
    file_id = upload(http, line("a")).json["id"]
    body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h", **fields}
    response = http.post("/v1/batches", json=body)
    assert (response.status_code, error_of(response)["param"]) == (status, param)


def test_what_nobody_knows_of_a_batch_is_named(http: FlaskClient) -> None:
    body = {"input_file_id": upload(http, line("a")).json["id"], "endpoint": CHAT, "colour": "red"}
    response = http.post("/v1/batches", json={**body, "metadata": {"a": "b"}})
    assert response.headers["X-Ignored-Fields"] == "colour"


def test_what_one_key_has_no_other_finds(
    settings: ServerSettings, engine: ScriptedClient, tmp_path: Path
) -> None:
    keys = read_keys({"ENGINEHOUSE_API_KEYS": "ann key-of-ann,bob key-of-bob"})
    given = dataclasses.replace(settings, api_keys=keys, files_dir=tmp_path / "files")
    app = create_app(given, engine)
    http = app.test_client()
    ann, bob = ({"Authorization": f"Bearer key-of-{name}"} for name in ("ann", "bob"))
    file_id = upload(http, line("a"), **ann).json["id"]
    assert http.get(f"/v1/files/{file_id}/content", headers=bob).status_code == 404
    body = {"input_file_id": file_id, "endpoint": CHAT}
    assert http.post("/v1/batches", json=body, headers=bob).status_code == 404
    made = http.post("/v1/batches", json=body, headers=ann).json
    assert http.get(f"/v1/batches/{made['id']}", headers=bob).status_code == 404
    http.environ_base["HTTP_AUTHORIZATION"] = ann["Authorization"]
    told = ended(app, http, made["id"])
    assert told["request_counts"]["completed"] == 1


def test_openais_client_runs_a_batch(app: Flask, http: FlaskClient) -> None:
    running = gevent.spawn(run_batches, app)

    def run(url: str) -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
            file = client.files.create(file=("in.jsonl", line("a").encode()), purpose="batch")
            batch = client.batches.create(
                input_file_id=file.id, endpoint=CHAT, completion_window="24h"
            )
            end_s = time.monotonic() + 20
            while (batch := client.batches.retrieve(batch.id)).status != "completed":
                assert time.monotonic() < end_s
            assert batch.output_file_id is not None
            told = json.loads(client.files.content(batch.output_file_id).text)
            assert told["custom_id"] == "a" and told["response"]["status_code"] == 200
            assert [each.id for each in client.batches.list()] == [batch.id]
            assert len(list(client.files.list())) == 2
            assert client.files.delete(file.id).deleted

    with served(http) as url:
        gevent.get_hub().threadpool.spawn(run, url).get(timeout=60)
    running.kill()


# A process that has all it needs, and for each line that it is told makes another one of itself,
# which works on the batches of a folder; each answer takes a moment.
_WORKERS = """
import os, random, sys
from pathlib import Path
from flask import Flask, request
from enginehouse.server.api.batches.folder import Folder
from enginehouse.server.api.batches.runner import Runner
app = Flask("worker")

@app.post("/v1/chat/completions")
def answer():
    import gevent
    gevent.sleep(random.random() / 100)
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    return {"echo": request.json["messages"], "usage": usage}

for _ in sys.stdin:
    number = os.fork()
    if not number:
        Runner(app, Folder(Path(sys.argv[1]), 10**9), lambda: 4, lambda: False).run()
    print(number, flush=True)
    os.waitpid(number, 0)
"""


def test_fifty_kills_lose_no_line_and_answer_none_twice(tmp_path: Path) -> None:
    folder, num_lines = Folder(tmp_path / "files", 10**9), 400
    source = folder.place("x.part")
    asked = [line(f"id-{number}", messages=[number]) for number in range(num_lines)]
    source.write_text("\n".join([*asked, "no json"]))
    file = folder.add(source, "", "in.jsonl", "batch", 7)
    journal = Journal(folder)
    made = new_batch(file.id, CHAT, "24h", {}, int(time.time()), "m")
    journal.add("", made)
    draw, end_s, num_while_working = random.Random(0), time.monotonic() + 120, 0

    def state() -> tuple[str, int]:
        batch = journal.get("", made["id"])
        assert batch is not None and time.monotonic() < end_s
        return batch.data["status"], sum(journal.counts(batch))

    with subprocess.Popen(
        [sys.executable, "-c", _WORKERS, str(folder.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as workers:
        assert workers.stdin is not None and workers.stdout is not None

        def start() -> int:
            print(file=workers.stdin, flush=True)
            assert workers.stdout is not None
            return int(workers.stdout.readline())

        for _ in range(50):
            worker, wanted = start(), state()[1] + draw.randint(0, 12)
            while state()[1] < wanted and state()[0] != "completed":
                time.sleep(0.001)
            os.kill(worker, signal.SIGKILL)
            num_while_working += state()[0] != "completed"
        worker = start()
        while state()[0] != "completed":
            time.sleep(0.005)
        os.kill(worker, signal.SIGKILL)
        workers.stdin.close()
    assert num_while_working >= 30
    batch = journal.get("", made["id"])
    assert batch is not None
    end = batch.data
    assert end["request_counts"] == {"total": num_lines + 1, "completed": num_lines, "failed": 1}
    with folder.place(end["output_file_id"]).open() as output:
        answers = [json.loads(each) for each in output]
    assert [each["custom_id"] for each in answers] == [f"id-{n}" for n in range(num_lines)]
    told = [each["response"]["body"]["echo"] for each in answers]
    assert told == [[number] for number in range(num_lines)]
    with folder.place(end["error_file_id"]).open() as output:
        [error] = [json.loads(each) for each in output]
    assert error["error"]["line"] == num_lines + 1
    names = {path.name for path in folder.path.iterdir() if path.name.startswith("file_")}
    assert {name for name in names if "." not in name} == {each.id for each in folder.files("")}


def test_a_process_is_known_again_by_more_than_its_number() -> None:
    mark = own_mark()
    assert runs(mark) and not runs(mark.replace(" ", " 1", 1)) and not runs("x")
    with subprocess.Popen(["sleep", "60"]) as child:
        of_child = mark.replace(mark.split()[0], str(child.pid), 1)
        assert not runs(of_child), "it began at another time"
        child.kill()

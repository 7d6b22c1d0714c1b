"""/v1/files and /v1/batches. Read this page first.

A batch is added to the journal and answered at once; a worker's runner finds it there.
Source: OpenAI's API reference, "Files" and "Batch".
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from flask import Flask, Response

from enginehouse.server.api.batches.body import BatchBody
from enginehouse.server.api.batches.folder import Folder, StoredFile
from enginehouse.server.api.batches.journal import Batch, Journal
from enginehouse.server.api.batches.new_batch import ENDED, new_batch
from enginehouse.server.api.batches.runner import Runner
from enginehouse.server.api.batches.uploads import read_upload
from enginehouse.server.http.kept import listed, not_found, owner, query
from enginehouse.server.http.service import Service, tell
from enginehouse.server.request.asked import ignored_fields
from enginehouse.server.wire.ids import Json
from enginehouse.server.wire.refusal import parse_body, refuse
from enginehouse.server.wire.responses import json_response

_PIECE_BYTES = 1 << 18
_RUNNER = "enginehouse.batches"


def add_batches(app: Flask, service: Service) -> None:
    """Files and batches, in the folder that the settings name."""
    settings = service.settings
    folder = Folder(settings.files_dir or _passing_folder(), settings.max_files_bytes)

    def num_at_once() -> int:
        """As many as the engine runs at once."""
        info = service.info
        return info.max_batch_size if info else 1

    app.extensions[_RUNNER] = Runner(app, folder, num_at_once, lambda: service.draining)
    journal = Journal(folder)
    _add_files(app, service, journal)
    _add_batches(app, service, journal)


def run_batches(app: Flask) -> None:
    """In a greenlet of its own, until the process ends."""
    runner: Runner = app.extensions[_RUNNER]
    runner.run()


def _passing_folder() -> Path:
    """Where no server has made one: it goes with the process."""
    folder = tempfile.mkdtemp(prefix="enginehouse-files-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _add_files(app: Flask, service: Service, journal: Journal) -> None:
    folder = journal.folder

    @app.post("/v1/files")
    def upload_file() -> Response:
        settings = service.settings
        given = read_upload(folder, settings.max_file_bytes, settings.body_timeout_s)
        made = folder.add(given.path, owner(), given.name, given.purpose, int(time.time()))
        return tell(json_response(made.told()), given.ignored)

    @app.get("/v1/files")
    def list_files() -> Response:
        wanted = query("purpose")
        told = [file.told() for file in folder.files(owner())]
        return json_response(listed([f for f in told if wanted in (None, f["purpose"])]))

    @app.get("/v1/files/<file_id>")
    def get_file(file_id: str) -> Response:
        return json_response(_file(folder, file_id).told())

    @app.delete("/v1/files/<file_id>")
    def delete_file(file_id: str) -> Response:
        file = _file(folder, file_id)
        if (batch_id := journal.reads(file.id)) is not None:
            words = f'"{batch_id}" has not ended and reads it; wait for it, or cancel it first'
            refuse("id", words, "file_in_use")
        folder.remove(file)
        return json_response({"id": file_id, "object": "file", "deleted": True})

    @app.get("/v1/files/<file_id>/content")
    def get_content(file_id: str) -> Response:
        file = _file(folder, file_id)
        response = Response(_pieces(folder.place(file.id)), content_type="application/octet-stream")
        response.content_length = file.num_bytes
        return response


def _add_batches(app: Flask, service: Service, journal: Journal) -> None:
    def found(batch_id: str) -> Batch:
        batch = journal.get(owner(), batch_id)
        if batch is None:
            not_found("id", "batch", batch_id)
        return batch

    @app.post("/v1/batches")
    def create_batch() -> Response:
        body = service.read(lambda data: parse_body(BatchBody, data, lambda fields: None))
        file = _file(journal.folder, body.input_file_id, "input_file_id")
        if file.purpose != "batch":
            refuse("input_file_id", f'its purpose is "{file.purpose}"; wanted "batch"')
        now, model = int(time.time()), service.settings.model_name
        made = new_batch(file.id, body.endpoint, body.completion_window, body.metadata, now, model)
        journal.add(owner(), made)
        return tell(json_response(made), ignored_fields(body))

    @app.get("/v1/batches")
    def list_batches() -> Response:
        return json_response(listed(journal.all(owner())))

    @app.get("/v1/batches/<batch_id>")
    def get_batch(batch_id: str) -> Response:
        return json_response(_told(journal, found(batch_id)))

    @app.post("/v1/batches/<batch_id>/cancel")
    def cancel_batch(batch_id: str) -> Response:
        batch = found(batch_id)
        if batch.data["status"] not in ENDED:
            journal.ask_to_cancel(batch, int(time.time()))
        return json_response(_told(journal, found(batch_id)))


def _told(journal: Journal, batch: Batch) -> Json:
    """As it stands: progress is counted while it runs, and a wish to end it is a status."""
    told = {name: value for name, value in batch.data.items() if name != "ending"}
    if told["status"] in ENDED:
        return told
    completed, failed = journal.counts(batch)
    counts = {**told["request_counts"], "completed": completed, "failed": failed}
    asked_at = batch.cancel_asked_at
    status = "cancelling" if asked_at else told["status"]
    return {**told, "request_counts": counts, "status": status, "cancelling_at": asked_at or None}


def _file(folder: Folder, file_id: str, param: str = "id") -> StoredFile:
    file = folder.file(owner(), file_id)
    if file is None:
        not_found(param, "file", file_id)
    return file


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece

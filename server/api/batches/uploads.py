"""The body of POST /v1/files, multipart/form-data -> a file in the folder and its purpose.

Knows Flask's request. Source: RFC 7578; OpenAI's API reference, "Upload file".
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import gevent
from flask import request
from werkzeug.datastructures import FileStorage
from werkzeug.exceptions import RequestEntityTooLarge

from enginehouse.runtime.errors import RequestError
from enginehouse.server.api.batches.folder import Folder
from enginehouse.server.wire.ids import new_id
from enginehouse.server.wire.refusal import refuse

PURPOSES = ("batch",)
_FIELDS_BYTES = 1 << 16  # beside the file
_PIECE_BYTES = 1 << 20


class Upload(NamedTuple):
    """path: of the bytes, under a name of its own. ignored: fields that nobody knows."""

    path: Path
    name: str
    purpose: str
    ignored: list[str]


def read_upload(folder: Folder, max_bytes: int, timeout_s: float) -> Upload:
    """Raises RequestError; what was written until then is gone."""
    if request.mimetype != "multipart/form-data":
        raise RequestError(
            f'Content-Type: found "{request.mimetype}"; wanted "multipart/form-data"',
            code="unsupported_media_type",
            status=415,
        )
    request.max_content_length = max_bytes + _FIELDS_BYTES
    folder.check_room(min(request.content_length or 0, max_bytes))
    try:
        with gevent.Timeout(timeout_s):
            form, files = request.form, request.files
    except gevent.Timeout:
        raise RequestError(
            f"the file did not arrive within {timeout_s:g} s; send it again",
            code="request_timeout",
            status=408,
        ) from None
    purpose = form.get("purpose")
    if purpose is None:
        refuse("purpose", 'missing; wanted "batch"', "missing_required_parameter")
    if purpose not in PURPOSES:
        refuse("purpose", f'found "{purpose[:60]}"; wanted one of {", ".join(PURPOSES)}')
    given = files.get("file")
    if given is None:
        refuse("file", "missing; wanted a file", "missing_required_parameter")
    # A part may have no name at all.
    unknown = sorted({str(each or "")[:60] for each in (*form, *files)} - {"purpose", "file"})
    path = _saved(folder, given, max_bytes)
    name = os.path.basename((given.filename or "upload.jsonl").replace("\\", "/"))[:255]
    return Upload(path, name, purpose, unknown)


def _saved(folder: Folder, given: FileStorage, max_bytes: int) -> Path:
    path, size = folder.place(f"{new_id('upload')}.part"), 0
    try:
        with path.open("wb") as written:
            while piece := given.stream.read(_PIECE_BYTES):
                size += len(piece)
                if size > max_bytes:
                    raise RequestEntityTooLarge
                written.write(piece)
                gevent.sleep(0)
        folder.check_room(size)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path

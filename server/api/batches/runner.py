"""Works through batches: every line is asked of the application as a client would ask it.

Lines give way to all that is asked directly (runtime/request.py, GIVES_WAY). One batch at a time in
each worker; what a worker that ends leaves, another one goes on with. Knows no endpoint.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import gevent
import msgspec
from flask import Flask
from gevent.pool import Pool
from werkzeug.datastructures import Headers
from werkzeug.test import EnvironBuilder, run_wsgi_app

from enginehouse.server.api.batches.folder import Folder
from enginehouse.server.api.batches.journal import Batch, Journal
from enginehouse.server.api.batches.lines import Line, error_line, output_line, read_lines
from enginehouse.server.wire.ids import Json, new_id
from enginehouse.server.wire.responses import KEY_NAME, OF_BATCH

T = TypeVar("T")
LOG = logging.getLogger("enginehouse.server")
_POLL_S = 1.0
_AGAIN_S = 1.0  # after the engine had no room, or was not there
_NOT_NOW = (429, 503)
_LINES_AT_ONCE = 64  # between which the event loop has its turn


class Runner:
    """num_at_once: lines that are asked at the same time. draining: the worker is about to end."""

    def __init__(
        self,
        app: Flask,
        folder: Folder,
        num_at_once: Callable[[], int],
        draining: Callable[[], bool],
    ) -> None:
        self._app = app
        self._folder = folder
        self._journal = Journal(folder)
        self._at_work: set[str] = set()  # the ids of batches, which two greenlets share
        self._num_at_once = num_at_once
        self._draining = draining

    def run(self) -> None:
        """Never ends by itself; a full disk is waited for."""
        gevent.spawn(self._end_those_that_wait)
        while True:
            if not self._work_on(None):
                gevent.sleep(_POLL_S)

    def _end_those_that_wait(self) -> None:
        """A batch behind another one is cancelled, and expires, all the same."""
        while True:
            gevent.sleep(_POLL_S)
            self._work_on(_now())

    def _work_on(self, over_at: int | None) -> bool:
        """On the next batch (`Journal.claim`); whether there was one."""
        try:
            batch = None if self._draining() else self._journal.claim(self._at_work, over_at)
            if batch is None:
                return False
            self._at_work.add(batch.id)
            try:
                self.work(batch)
            finally:
                self._at_work.discard(batch.id)
            return True
        except (OSError, sqlite3.Error) as error:
            LOG.warning("batches wait: %s", error)
            return False

    def work(self, batch: Batch) -> None:
        """To its end, or until the worker drains; then somebody else may go on."""
        reason = ""
        if batch.data["status"] != "finalizing":
            if not self._folder.place(str(batch.data["input_file_id"])).exists():
                self._fail(batch, "the input file was deleted")
                return
            if batch.data["status"] == "validating":
                total = sum(1 for _ in self._lines(batch))
                if not total:
                    self._fail(batch, "the input file has no line")
                    return
                counts = {"total": total, "completed": 0, "failed": 0}
                told = {"request_counts": counts, "in_progress_at": _now()}
                self._told(batch, status="in_progress", **told)
            reason = self._answer_all(batch)
        if reason == "draining":
            self._journal.leave(batch)
            return
        self._finalize(batch, reason)

    def _lines(self, batch: Batch) -> Iterator[Line]:
        """Of the input file."""
        path = self._folder.place(str(batch.data["input_file_id"]))
        return _in_turns(read_lines(path, str(batch.data["endpoint"])))

    def _answer_all(self, batch: Batch) -> str:
        """Why not all are answered: cancelled, expired, draining; empty: they are."""
        done = self._journal.answered(batch)
        pool = Pool(max(1, self._num_at_once()))
        reason, looked_s = "", 0.0
        try:
            for line in self._lines(batch):
                while not reason and (pool.full() or time.monotonic() - looked_s > _POLL_S):
                    pool.wait_available(timeout=_POLL_S)
                    reason, looked_s = self._reason_to_end(batch), time.monotonic()
                if reason:
                    break
                if line.number in done:
                    continue
                if line.error is not None:
                    self._put_error(batch, line, line.error.code or "invalid", line.error.message)
                else:
                    pool.spawn(self._answer, batch, line)
            while not reason and not pool.join(timeout=_POLL_S):
                reason = self._reason_to_end(batch)
        finally:
            pool.kill()
        if reason == "expired":
            self._expire_rest(batch)
        return reason

    def _reason_to_end(self, batch: Batch) -> str:
        if self._journal.cancel_asked_at(batch):
            return "cancelled"
        if _now() >= batch.data["expires_at"]:
            return "expired"
        return "draining" if self._draining() else ""

    def _answer(self, batch: Batch, line: Line) -> None:
        """Asked again as long as the engine has no room or is not there."""
        request_id = f"{batch.id}-{line.number}"
        try:
            status, body = self._ask(line.body, batch, request_id)
            while status in _NOT_NOW:
                gevent.sleep(_AGAIN_S)
                status, body = self._ask(line.body, batch, request_id)
        except Exception:  # a greenlet's own is told to nobody, and the line would have no answer
            LOG.exception("%s failed", request_id, extra={"request_id": request_id})
            words = f"the server failed on this line; its log has more under {request_id}"
            self._put_error(batch, line, "server_error", words)
            return
        told = output_line(line, status, request_id, body)
        self._put(batch, line.number, told, is_error=status != 200)

    def _put(self, batch: Batch, number: int, told: Json, *, is_error: bool) -> None:
        """A full disk is waited for, with the answer at hand."""
        while True:
            try:
                self._journal.put_answer(batch, number, told, is_error)
                return
            except (OSError, sqlite3.Error) as error:
                LOG.warning("line %d of %s waits to be kept: %s", number, batch.id, error)
                gevent.sleep(_AGAIN_S)

    def _ask(self, body: Json, batch: Batch, request_id: str) -> tuple[int, Json]:
        builder = EnvironBuilder(
            path=str(batch.data["endpoint"]),
            method="POST",
            data=msgspec.json.encode(body),
            content_type="application/json",
            headers=Headers({"X-Request-Id": request_id}),
        )
        environ: dict[str, Any] = dict(builder.get_environ())
        environ[OF_BATCH] = True
        if batch.owner:
            environ[KEY_NAME] = batch.owner
        parts, status, _ = run_wsgi_app(self._app.wsgi_app, environ, buffered=True)
        told: Json = msgspec.json.decode(b"".join(parts))
        return int(status.split()[0]), told

    def _put_error(self, batch: Batch, line: Line, code: str, message: str) -> None:
        told = error_line(line.number, line.custom_id, code, message)
        self._put(batch, line.number, told, is_error=True)

    def _expire_rest(self, batch: Batch) -> None:
        done = self._journal.answered(batch)
        for line in self._lines(batch):
            if line.number not in done:
                words = "the batch's completion_window is over"
                self._put_error(batch, line, "batch_expired", words)

    def _finalize(self, batch: Batch, reason: str) -> None:
        """Answers and errors become files. What is written has its id before: done again after a
        crash, it takes the place of what there was.
        """
        completed, failed = self._journal.counts(batch)
        if batch.data["status"] != "finalizing":
            output, errors = (new_id("file") if num else None for num in (completed, failed))
            ids = {"output_file_id": output, "error_file_id": errors}
            self._told(batch, status="finalizing", finalizing_at=_now(), ending=reason, **ids)
        counts = {**batch.data["request_counts"], "completed": completed, "failed": failed}
        usage = _Usage()
        for are_errors, name in ((False, "output_file_id"), (True, "error_file_id")):
            if (file_id := batch.data[name]) is not None:
                self._write(batch, file_id, are_errors, usage)
        ending = batch.data.pop("ending", "") or "completed"
        batch.data["cancelling_at"] = self._journal.cancel_asked_at(batch) or None
        batch.data.update(
            status=ending, request_counts=counts, usage=usage.told(), **{f"{ending}_at": _now()}
        )
        self._journal.end(batch)
        LOG.info("%s is %s: %d answered, %d failed", batch.id, ending, completed, failed)

    def _write(self, batch: Batch, file_id: str, are_errors: bool, usage: _Usage) -> None:
        partial = self._folder.place(f"{file_id}.part")
        with partial.open("wb") as file:
            for answer in _in_turns(self._journal.answers(batch, are_errors)):
                file.write(answer + b"\n")
                usage.add(answer)
        name = f"{batch.id}_{'error' if are_errors else 'output'}.jsonl"
        self._folder.add(partial, batch.owner, name, "batch_output", _now(), file_id)

    def _fail(self, batch: Batch, message: str) -> None:
        """With what is answered of it."""
        error = {"code": "invalid_input_file", "message": message, "param": "input_file_id"}
        batch.data["errors"] = {"object": "list", "data": [{**error, "line": None}]}
        self._finalize(batch, "failed")

    def _told(self, batch: Batch, **changes: Any) -> None:
        batch.data.update(changes)
        self._journal.update(batch)


class _Usage:
    """Summed over answers of every endpoint."""

    def __init__(self) -> None:
        self._num_input = self._num_output = 0
        self._cost = 0.0

    def add(self, answer: bytes) -> None:
        response = msgspec.json.decode(answer)["response"] or {}
        usage = response.get("body", {}).get("usage") or {}
        self._num_input += usage.get("prompt_tokens", usage.get("input_tokens", 0))
        self._num_output += usage.get("completion_tokens", usage.get("output_tokens", 0))
        self._cost += usage.get("estimated_cost", 0.0)

    def told(self) -> Json:
        return {
            "input_tokens": self._num_input,
            "output_tokens": self._num_output,
            "total_tokens": self._num_input + self._num_output,
            "estimated_cost": round(self._cost, 10),
        }


def _in_turns(items: Iterator[T]) -> Iterator[T]:
    """The event loop has its turn between them."""
    for number, item in enumerate(items):
        if number % _LINES_AT_ONCE == 0:
            gevent.sleep(0)
        yield item


def _now() -> int:
    """Seconds since 1970: what is kept outlives the machine's other clocks."""
    return int(time.time())

"""A batch that runs beside a load, and how much of it was answered meanwhile."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from enginehouse.server.api.batches.folder import Folder
from enginehouse.server.api.batches.journal import Journal
from enginehouse.server.api.batches.new_batch import new_batch

_COMPLETIONS = "/v1/chat/completions"
_NUM_LINES, _MOST_S = 5000, 60.0


class Batches:
    """folder: ENGINEHOUSE_FILES_DIR of the server that works on them; what was there goes."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self._folder = Folder(folder, 1 << 40)
        self._journal = Journal(self._folder)
        self.num_answered = 0  # of the last batch, while the block ran

    @contextmanager
    def running(self, model: str, next_prompt: Callable[[], str], tokens: int) -> Iterator[None]:
        """More lines than can be answered; the block begins once the first ones are."""
        source, now = self._folder.place("in.part"), int(time.time())
        with source.open("w", encoding="utf-8") as file:
            for number in range(_NUM_LINES):
                message = {"role": "user", "content": next_prompt()}
                body = {"model": model, "messages": [message], "max_tokens": tokens}
                line = {"custom_id": str(number), "method": "POST", "url": _COMPLETIONS}
                file.write(json.dumps({**line, "body": {**body, "ignore_eos": True}}) + "\n")
        input_file = self._folder.add(source, "", "in.jsonl", "batch", now)
        made = new_batch(input_file.id, _COMPLETIONS, "1d", {}, now, model)
        self._journal.add("", made)
        self._wait(made["id"], lambda answered, status: answered > 0)
        before = self._answered(made["id"])
        try:
            yield
            self.num_answered = self._answered(made["id"]) - before
        finally:
            batch = self._journal.get("", made["id"])
            assert batch is not None
            self._journal.ask_to_cancel(batch)
            self._wait(made["id"], lambda answered, status: status == "cancelled")

    def _answered(self, batch_id: str) -> int:
        batch = self._journal.get("", batch_id)
        assert batch is not None
        return sum(self._journal.counts(batch))

    def _wait(self, batch_id: str, enough: Callable[[int, str], bool]) -> None:
        end_s = time.monotonic() + _MOST_S
        while True:
            batch = self._journal.get("", batch_id)
            assert batch is not None
            if enough(self._answered(batch_id), batch.data["status"]):
                return
            if time.monotonic() > end_s:
                raise SystemExit(f"the batch is {batch.data['status']} after {_MOST_S:g} s")
            time.sleep(0.1)

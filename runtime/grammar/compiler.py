"""Constraints -> compiled grammars, off the engine's loop, tried in a process that may be lost.

`compile` checks at once and answers with a future. Compiled grammars and verdicts are kept, the
last used longest. xgrammar, and torch with it, is imported by `start` or by the first grammar's
thread: who is asked for no grammar has neither. Knows no sequence and no token.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from enginehouse.runtime.errors import EngineError, RequestError
from enginehouse.runtime.grammar.constraint import check, refusal
from enginehouse.runtime.grammar.support import Support, installed
from enginehouse.runtime.request import Constraint, ConstraintKind

if TYPE_CHECKING:
    import xgrammar

    from enginehouse.runtime.grammar.child import Compiled, Verdict

DEFAULT_TIMEOUT_S = 60.0
_AT_ONCE = 4  # a grammar that hangs keeps one of these busy until its time is over
_MAX_KEPT = 128
_MAX_KEPT_BYTES = 256 << 20

Grammar = Future["Compiled"]
_Key = tuple[ConstraintKind, str]


class GrammarCompiler:
    """Owns the compiled grammars, and the process that tries them: `start` or the first one
    starts it. support: of the xgrammar that follows them; None: of the one that is installed.
    """

    def __init__(
        self,
        engine_dir: Path,
        vocab_size: int,
        stop_token_ids: tuple[int, ...],
        timeout_s: float = DEFAULT_TIMEOUT_S,
        support: Support | None = None,
    ) -> None:
        self.timeout_s = timeout_s
        self._support = support or installed()
        self._engine_dir = engine_dir.resolve()
        self._vocab_size = vocab_size
        self._stop_token_ids = list(stop_token_ids)
        self._info: xgrammar.TokenizerInfo | None = None
        self._child: _Child | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="grammar")
        self._kept: OrderedDict[_Key, Grammar] = OrderedDict()

    def start(self) -> None:
        """Start the process, which takes seconds, beside whatever the caller does next."""
        if self._why_not() is None:
            self._threads.submit(self._running)

    def compile(self, constraint: Constraint) -> Grammar:
        """The grammar, or its future's RequestError; RequestError at once when that can be seen.

        The future must be given back to `forget` when nobody waits for it any more.
        """
        if (missing := self._why_not()) is not None:
            raise refusal(
                constraint, f"this engine has no {missing}, so no constraint can be followed"
            )
        checked = check(constraint, self._support)
        key = (checked.kind, checked.value)
        grammar = self._kept.get(key)
        if grammar is None or grammar.cancelled() or _may_end_otherwise(grammar):
            grammar = self._kept[key] = self._threads.submit(self._compile, checked)
        self._kept.move_to_end(key)
        self._evict()
        return grammar

    def forget(self, grammar: Grammar) -> None:
        """Nobody waits for it: do not begin it."""
        grammar.cancel()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._closed = True
            if self._child is not None:
                self._child.close()

    def _why_not(self) -> str | None:
        """What this engine lacks for any constraint to be followed."""
        if not self._stop_token_ids:
            return "end-of-sequence token"
        return None if (self._engine_dir / "tokenizer.json").is_file() else "tokenizer.json"

    def _evict(self) -> None:
        done = [g for g in self._kept.values() if g.done() and not g.cancelled()]
        size = sum(g.result().memory_size_bytes for g in done if g.exception() is None)
        for key in list(self._kept)[:-1]:
            if len(self._kept) <= _MAX_KEPT and size <= _MAX_KEPT_BYTES:
                return
            grammar = self._kept[key]
            if grammar.done():
                del self._kept[key]
                if not grammar.cancelled() and grammar.exception() is None:
                    size -= grammar.result().memory_size_bytes

    def _compile(self, constraint: Constraint) -> Compiled:
        import xgrammar

        from enginehouse.runtime.grammar.child import Compiled, Job, build_grammar

        child, info = self._running()
        spaces = self._support.any_whitespace
        job = Job(constraint.kind, constraint.value, self.timeout_s, spaces)
        began_s = time.monotonic()
        answer = child.run(msgspec.msgpack.encode(job))
        name = constraint.kind.value
        verdict = _read_verdict(answer)
        if verdict is None and child.gone:
            raise EngineError("the grammar compiler stopped; its next request starts it again")
        if verdict is None:
            slow = time.monotonic() - began_s >= self.timeout_s
            why = f"{self.timeout_s:g} seconds" if slow else "too much memory"
            raise _Lost(
                f"the {name} takes {why} to compile; make it simpler",
                param=constraint.param,
                code="invalid_value",
            )
        if verdict.error is not None:
            used = self._support.version
            hint = "" if self._support.is_newest else f" (by xgrammar {used}; newer ones take more)"
            raise refusal(constraint, f"the {name} cannot be followed{hint}: {verdict.error}")
        if verdict.compiled is not None:
            grammar = xgrammar.CompiledGrammar.deserialize_json(verdict.compiled, info)
            return Compiled(grammar, verdict.counts)
        return build_grammar(info, constraint.kind, constraint.value, spaces)

    def _running(self) -> tuple[_Child, xgrammar.TokenizerInfo]:
        """The process, started again if it is gone, and the vocabulary it was started with."""
        from enginehouse.runtime.grammar.child import tokenizer_info

        with self._lock:
            if self._closed:  # while its thread was still importing
                raise EngineError("the engine is closed")
            args = (self._engine_dir, self._vocab_size, self._stop_token_ids)
            if self._child is not None and self._child.gone:
                self._child.close()
                self._child = None
            if self._child is None:
                self._child = _Child(*args)
            if self._info is None:
                self._info = tokenizer_info(*args)
            assert self._info is not None
            return self._child, self._info


def _read_verdict(answer: bytes) -> Verdict | None:
    """None where the process was lost before all of it was written."""
    from enginehouse.runtime.grammar.child import Verdict

    try:
        return msgspec.msgpack.decode(answer, type=Verdict)
    except msgspec.DecodeError:
        return None


class _Lost(RequestError):
    """A refusal that another try may not repeat: by the clock, or by the machine's memory."""


def _may_end_otherwise(grammar: Grammar) -> bool:
    """Whether it failed by no fault of its own; a verdict on it is remembered like a result."""
    error = grammar.exception() if grammar.done() else None
    return error is not None and (isinstance(error, _Lost) or not isinstance(error, RequestError))


class _Child:
    """The process of `child`, which forks for every job."""

    def __init__(self, engine_dir: Path, vocab_size: int, stop_token_ids: list[int]) -> None:
        self._channel, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "enginehouse.runtime.grammar.child"),
                    *(str(theirs.fileno()), str(engine_dir), str(vocab_size)),
                    *(str(token_id) for token_id in stop_token_ids),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # its forks end with it
                cwd="/",  # its folders never shadow a library
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    @property
    def gone(self) -> bool:
        return self._process.poll() is not None

    def run(self, job: bytes) -> bytes:
        """What the job wrote before its process ended; nothing when it was lost."""
        job_out, job_in = os.pipe()
        result_out, result_in = os.pipe()
        with (
            os.fdopen(job_in, "wb", buffering=0) as job_pipe,
            os.fdopen(result_out, "rb") as result_pipe,
        ):
            try:
                socket.send_fds(self._channel, [b"j"], [job_out, result_in])
            except OSError:
                return b""
            finally:
                os.close(job_out)
                os.close(result_in)
            try:
                job_pipe.write(job)
                job_pipe.close()
            except BrokenPipeError:
                pass
            return result_pipe.read()

    def close(self) -> None:
        self._channel.close()
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()

"""The process that tries grammars out: whatever a constraint does to it, the engine goes on.

A grammar that compiled here, in time and within memory, goes to the engine as text, which is read
in a tenth of the time. Where that text would be larger than MAX_TEXT_BYTES, or the xgrammar is too
old to write it, the engine compiles the grammar again for itself.
It reads the vocabulary once and then forks for every grammar. A fork has a limit on its memory
and on its time, both enforced by the kernel, and dies alone. Started by `compiler.py`,
with which it shares a socket; a job and its result pass through pipes of their own.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil
import torch
import xgrammar

from enginehouse.runtime.grammar.automata import automata_error
from enginehouse.runtime.grammar.counted import count_characters, with_bounds_apart
from enginehouse.runtime.grammar.support import installed
from enginehouse.runtime.grammar.vocabulary import read_vocabulary
from enginehouse.runtime.request import ConstraintKind

MEMORY_BYTES = 1 << 30  # that one grammar may take beyond what the process has
MAX_GRAMMAR_BYTES = 64 << 20  # of a compiled one, in memory
MAX_TEXT_BYTES = 8 << 20  # of a compiled one, as text
MAX_THREADS = 4  # of one job: each takes address space, which is bounded
_REHEARSED_TOKENS = 128
_REHEARSED_COUNTED_S = 0.3  # of processor time, where characters are counted
_SLOW_S = 0.1  # of processor time for one token: the engine would wait for it
_SLOW_COUNTED_S = 1.0  # where characters are counted: the last of a string cost more than the rest
_NICENESS = 5
# What a structural tag says of tokens is known to the compiler only, which has the vocabulary.
_OF_TOKENS = ("token", "exclude_token", "any_tokens", "token_triggered_tags")


class Job(NamedTuple):
    """One grammar to try, and the seconds it may take."""

    kind: ConstraintKind
    value: str
    timeout_s: float
    any_whitespace: bool = False


class Compiled(NamedTuple):
    """counts: whether the matcher counts characters anywhere in it. text_bytes: about as many as
    it has as text; None: it cannot be written.
    """

    grammar: xgrammar.CompiledGrammar
    counts: bool = False
    text_bytes: int | None = None

    @property
    def memory_size_bytes(self) -> int:
        return int(self.grammar.memory_size_bytes)


class Verdict(NamedTuple):
    """What is wrong with a grammar, if anything is; else the compiled one as text, if it may be
    read.
    """

    error: str | None = None
    compiled: str | None = None
    counts: bool = False


def tokenizer_info(
    engine_dir: Path, vocab_size: int, stop_token_ids: list[int]
) -> xgrammar.TokenizerInfo | None:
    """The vocabulary as xgrammar wants it; None without a tokenizer.json."""
    pieces = read_vocabulary(engine_dir, vocab_size)
    if pieces is None:
        return None
    return xgrammar.TokenizerInfo(
        pieces, xgrammar.VocabType.RAW, vocab_size=vocab_size, stop_token_ids=stop_token_ids
    )


def try_grammar(info: xgrammar.TokenizerInfo, job: Job) -> Verdict:
    """Compile and follow it for a while; what xgrammar only warns of is an error here."""
    with _CapturedStderr() as captured:
        try:
            compiled = build_grammar(*(info, *job[:2]), job.any_whitespace, _num_threads())
        except Exception as error:  # a C++ error of any kind, or pydantic's
            return Verdict(error=_sentence(str(error)))
    if warnings := captured.text.strip():
        return Verdict(error=_sentence(warnings))
    if compiled.memory_size_bytes > MAX_GRAMMAR_BYTES:
        return Verdict(error="it makes too large a grammar; make it simpler")
    if not installed().has("automata that are right"):
        wrong = automata_error(compiled.grammar.grammar.serialize_json())
        if wrong is not None:
            return Verdict(wrong, None, compiled.counts)
    wrong = rehearse(compiled)
    if wrong is not None or (compiled.text_bytes or MAX_TEXT_BYTES) >= MAX_TEXT_BYTES:
        return Verdict(wrong, None, compiled.counts)
    return Verdict(None, compiled.grammar.serialize_json(), compiled.counts)


def build_grammar(
    info: xgrammar.TokenizerInfo,
    kind: ConstraintKind,
    value: str,
    any_whitespace: bool = False,
    max_threads: int = 1,
) -> Compiled:
    """One constraint, checked by `constraint.py`, by xgrammar; RuntimeError where it cannot."""
    compiler = xgrammar.GrammarCompiler(info, max_threads=max_threads, cache_enabled=False)
    if installed().has("counted characters") and not any_whitespace and not _names_tokens(value):
        counted = count_characters(_grammar(kind, value))
        grammar = compiler.compile_grammar(counted.grammar)
        return Compiled(grammar, counted.counts, counted.text_bytes)
    if kind is ConstraintKind.JSON_SCHEMA:
        return Compiled(compiler.compile_json_schema(value, any_whitespace=any_whitespace))
    if kind is ConstraintKind.REGEX:
        return Compiled(compiler.compile_regex(value))
    if kind is ConstraintKind.STRUCTURAL_TAG:
        return Compiled(compiler.compile_structural_tag(value))
    return Compiled(compiler.compile_grammar(value))


def _grammar(kind: ConstraintKind, value: str) -> xgrammar.Grammar:
    if kind is ConstraintKind.JSON_SCHEMA:
        return with_bounds_apart(
            value, lambda text: xgrammar.Grammar.from_json_schema(text, any_whitespace=False)
        )
    if kind is ConstraintKind.REGEX:
        return xgrammar.Grammar.from_regex(value)
    if kind is ConstraintKind.STRUCTURAL_TAG:
        return with_bounds_apart(value, xgrammar.Grammar.from_structural_tag)
    return xgrammar.Grammar.from_ebnf(value)


def _names_tokens(value: str) -> bool:
    return any(f'"{name}"' in value for name in _OF_TOKENS)


def rehearse(compiled: Compiled) -> str | None:
    """Follow the grammar at random for a while; why it cannot be followed, if so."""
    matcher = xgrammar.GrammarMatcher(compiled.grammar)
    size = compiled.grammar.tokenizer_info.vocab_size
    bitmask = xgrammar.allocate_token_bitmask(1, size)
    slow_s = _SLOW_COUNTED_S if compiled.counts else _SLOW_S
    first_s = time.process_time()
    choose = random.Random(0)
    bits = torch.arange(32, dtype=torch.int32)
    for _ in range(_REHEARSED_TOKENS):
        began_s = time.process_time()
        matcher.fill_next_token_bitmask(bitmask)
        allowed = ((bitmask[0, :, None] >> bits) & 1).flatten()[:size].nonzero().flatten()
        if not len(allowed):
            return "nothing satisfies it; change it so that some text does"
        token = int(allowed[choose.randrange(len(allowed))])
        matcher.accept_token(token)
        if time.process_time() - began_s > slow_s:
            return "it takes too long to follow; make it less ambiguous"
        if compiled.counts and time.process_time() - first_s > _REHEARSED_COUNTED_S:
            return None
        if matcher.is_terminated():
            matcher.reset()
    return None


class _CapturedStderr:
    """What C++ writes to standard error meanwhile."""

    text = ""

    def __enter__(self) -> _CapturedStderr:
        self._saved = os.dup(2)
        self._file = tempfile.TemporaryFile()
        os.dup2(self._file.fileno(), 2)
        return self

    def __exit__(self, *_: object) -> None:
        os.dup2(self._saved, 2)
        os.close(self._saved)
        self._file.seek(0)
        self.text = self._file.read().decode(errors="replace")
        self._file.close()


def _sentence(message: str) -> str:
    """The words of xgrammar's message, without where in its sources they come from."""
    line = message.strip().splitlines()[0] if message.strip() else "unknown error"
    for mark in ("Warning: ", ".cc:"):
        if mark in line:
            line = line.split(mark, 1)[1]
    line = line.lstrip("0123456789: ").removeprefix("Check failed: ").strip()
    return line[:300] or "it cannot be compiled"


def _num_threads() -> int:
    return min(MAX_THREADS, len(psutil.Process().cpu_affinity() or [0]))


def _run_job(info: xgrammar.TokenizerInfo, job_pipe: int, result_pipe: int) -> None:
    with os.fdopen(job_pipe, "rb") as pipe:
        job = msgspec.msgpack.decode(pipe.read(), type=Job)
    signal.setitimer(signal.ITIMER_REAL, job.timeout_s)  # SIGALRM ends the process
    if sys.platform == "linux":
        limit = psutil.Process().memory_info().vms + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    verdict = try_grammar(info, job)
    with os.fdopen(result_pipe, "wb") as pipe:
        pipe.write(msgspec.msgpack.encode(verdict))


def main() -> None:
    """argv: the socket's descriptor, the engine directory, vocab_size, its stop ids."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    engine_dir, vocab_size = Path(sys.argv[2]), int(sys.argv[3])
    stop_token_ids = [int(text) for text in sys.argv[4:]]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.nice(_NICENESS)
    torch.set_num_threads(1)
    info = tokenizer_info(engine_dir, vocab_size, stop_token_ids)
    assert info is not None, "the compiler starts this process only with a vocabulary"
    while True:
        data, descriptors, _, _ = socket.recv_fds(channel, 1, 2)
        if not data:
            return
        if os.fork() == 0:
            channel.close()
            status = 1
            try:
                _run_job(info, *descriptors)
                status = 0
            finally:
                os._exit(status)
        for descriptor in descriptors:
            os.close(descriptor)


if __name__ == "__main__":
    main()

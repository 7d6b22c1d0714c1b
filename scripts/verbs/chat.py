"""`enginehouse chat`: a conversation in the terminal, with a server or with an engine directory.

Lines in, answers out as they come. Where standard input is no terminal, answers alone are printed,
so that it can stand in a pipe. What is sent and how answers are read is server/client/'s; text of
the model reaches the terminal without its control characters.
"""

from __future__ import annotations

import argparse
import difflib
import io
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.client.connection import (
    CHAT,
    Connection,
    ServerRefused,
    is_address,
    parse_address,
)
from enginehouse.server.client.conversation import AnswerReader, Conversation, Piece
from enginehouse.server.client.own_server import OwnServer, free_port, serve_command
from enginehouse.verbs.base import VerbParser, count_up_to

COMMANDS = {
    "/help": "these lines",
    "/reset": "forget the conversation",
    "/system TEXT": "set the system message; without TEXT, show it",
    "/exit": "leave, as Ctrl-D does",
}
Explain = Callable[[EnginehouseError], str]
_SILENCE_S = 600.0
_START_S = 1200.0
_HEARD_S = 0.5
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
# Controls of ASCII and of Latin-1 but newline and tab, and halves of characters no terminal takes.
_UNPRINTABLE = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160), *range(0xD800, 0xE000)])


def make_parser() -> VerbParser:
    parser = VerbParser(
        "chat",
        "URL-or-ENGINE [flags]",
        "Talk to a running server, or to an engine directory, which is served as long as the chat "
        "lasts. Ctrl-C stops an answer; at the prompt, it leaves. /help lists the commands.",
        "enginehouse chat http://127.0.0.1:8000 --system 'Answer in one sentence.'",
        "enginehouse chat engines/mine",
        "echo 'What is the capital of France?' | enginehouse chat engines/mine",
    )
    parser.add_argument(
        "target", metavar="URL-or-ENGINE", help="http://host:port[/v1], or an engine"
    )
    parser.add_argument("--model", help="default: the first of /v1/models")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="0 to 2; default: the server's"
    )
    parser.add_argument(
        "--max-tokens", type=count_up_to(1_000_000), metavar="N", help="of an answer"
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="default: ENGINEHOUSE_API_KEY, else OPENAI_API_KEY, of the environment",
    )
    return parser


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # no byte and no character ends a chat
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)  # so that a server of our own is ended
    env = os.environ
    key = args.api_key or env.get("ENGINEHOUSE_API_KEY") or env.get("OPENAI_API_KEY")
    with _served(args.target) as (url, explain):
        connection = Connection(parse_address(url), lambda: _SILENCE_S, key)
        model = args.model or connection.first_model()
        Chat(connection, _conversation(model, args), explain).run()
    return 0


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _conversation(model: str, args: argparse.Namespace) -> Conversation:
    given = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    fields = {name: value for name, value in given.items() if value is not None}
    return Conversation(model, args.system, **fields)


@contextmanager
def _served(target: str) -> Generator[tuple[str, Explain], None, None]:
    """The address of a server, the one that is given or one of our own for an engine, and what to
    say of its failures.
    """
    if is_address(target):
        yield target, str
        return
    if not Path(target).is_dir():
        raise EnginehouseError(
            f"{target} is neither an engine directory nor an address like http://127.0.0.1:8000"
        )
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    port = free_port()
    descriptor, log = tempfile.mkstemp(prefix="enginehouse-chat-", suffix=".log")
    os.close(descriptor)
    with OwnServer(serve_command(target, port), port, Path(log)) as server:
        with console.status(f"starting a server for {target}; its log is {log}"):
            server.wait_ready(_START_S)  # when that fails the log stays, and the error names it
        try:
            yield f"http://127.0.0.1:{port}", server.explain
        finally:
            if not server.keeps_log:
                os.unlink(log)


@contextmanager
def _ctrl_c_is_heard() -> Iterator[None]:
    """Ctrl-C that comes just before a wait for the network does not end that wait, and is heard
    with the next signal: here one comes twice a second.
    """
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, _HEARD_S, _HEARD_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Chat:
    """Owns the terminal: reads lines, prints answers. Knows no HTTP."""

    def __init__(
        self, connection: Connection, conversation: Conversation, explain: Explain
    ) -> None:
        self._connection = connection
        self._explain = explain
        self._conversation = conversation
        self._typed = sys.stdin.isatty() and sys.stdout.isatty()
        self._thinking = False
        self._styled = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"

    def run(self) -> None:
        """Until /exit, the end of input, or Ctrl-C where no answer is being given."""
        if self._typed:
            with suppress(ImportError):
                import readline  # noqa: F401  # input() edits with it
            print(self._dim(f"{self._connection.address}; /help lists the commands"))
        try:
            for line in self._lines():
                if not line.startswith("/"):
                    self._answer(line)
                elif not self._command(line):
                    return
        except KeyboardInterrupt:
            print()

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                line = input("> " if self._typed else "").strip()
            except EOFError:
                if self._typed:
                    print()
                return
            if line:
                yield line

    def _command(self, line: str) -> bool:
        """Obey; False when the chat is to end."""
        name, _, text = line.partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name == "/help":
            print("\n".join(f"{command:<13} {what}" for command, what in COMMANDS.items()))
        elif name == "/reset":
            self._conversation.reset()
        elif name == "/system":
            self._conversation.system = text.strip() or self._conversation.system
            if not text.strip():
                print(self._conversation.system or "there is no system message")
        else:
            near = difflib.get_close_matches(name, [c.split()[0] for c in COMMANDS], n=1)
            hint = f"did you mean {near[0]}?" if near else "/help lists those there are"
            self._complain(f"there is no command {name}; {hint}")
        return True

    def _answer(self, question: str) -> None:
        """Ask, print what comes, and keep it. A question that failed is not kept."""
        reader, asked_s, stopped = AnswerReader(), time.monotonic(), False
        self._thinking = False
        try:
            body = self._conversation.body(question)
            with _ctrl_c_is_heard(), self._connection.stream(CHAT, body) as lines:
                for line in lines:
                    for piece in reader.push(line):
                        self._show(piece)
            reader.check_end()
        except KeyboardInterrupt:  # the connection is closed: the server cancels
            stopped = True
        except EnginehouseError as error:
            print("\n" if reader.text or self._thinking else "", end="")
            refused = isinstance(error, ServerRefused) and error.status < 500
            self._complain(str(error) if refused else self._explain(error))
            return
        print("" if reader.text.endswith("\n") else "\n", end="", flush=True)
        if reader.text or not stopped:
            self._conversation.keep(question, reader.text)
        if self._styled:
            print(self._dim(_summary(reader, stopped, time.monotonic() - asked_s)), flush=True)

    def _show(self, piece: Piece) -> None:
        text = piece.text.translate(_UNPRINTABLE)
        if piece.reasoning and not self._styled:  # a pipe gets answers only
            return
        if self._thinking and not piece.reasoning:
            print()
        self._thinking = piece.reasoning
        print(self._dim(text) if piece.reasoning else text, end="", flush=True)

    def _dim(self, text: str) -> str:
        return f"{_DIM}{text}{_PLAIN}" if self._styled else text

    def _complain(self, sentence: str) -> None:
        print(f"enginehouse chat: {sentence.translate(_UNPRINTABLE)}", file=sys.stderr, flush=True)


def _summary(reader: AnswerReader, stopped: bool, seconds: float) -> str:
    """What is known of an answer. Tokens per second are from the question to the end."""
    facts = []
    if reader.num_tokens is not None:
        facts += [f"{reader.num_tokens} tokens", f"{reader.num_tokens / seconds:.1f} tokens/s"]
    facts.append("stopped" if stopped else str(reader.finish_reason))
    if reader.cost is not None:
        facts.append(f"${reader.cost:.7f}")
    return ", ".join(facts)

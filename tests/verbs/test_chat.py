"""`chat`: what it sends, what it prints, and how it ends, against a scripted server."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from doubles.scripted_http import WAIT, Refusal, chunks, serving
from enginehouse.server.client.own_server import OwnServer
from enginehouse.verbs.main import main

DEADLINE_S = 30


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without keys of the environment; signals go back to whom they belonged."""
    for name in ("ENGINEHOUSE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def type_lines(monkeypatch: pytest.MonkeyPatch) -> Any:
    def type_lines(*lines: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))

    return type_lines


def echo(body: dict[str, Any]) -> list[str]:
    return list(chunks("you said ", body["messages"][-1]["content"]))


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_a_conversation_is_sent_whole_and_answers_alone_are_printed(
    type_lines: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    type_lines("one", "", "/system Be brief.", "/system", "two", "/reset", "three")
    with serving(echo) as server:
        words = ["--temperature", "0.5", "--max-tokens", "7", "--model", "m"]
        assert main(["chat", server.url, *words]) == 0
    first, second = [said("user", "one"), said("assistant", "you said one")], said("user", "two")
    system = said("system", "Be brief.")
    sent = [body["messages"] for body in server.bodies]
    assert sent == [first[:1], [system, *first, second], [system, said("user", "three")]]
    for body in server.bodies:
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.5, 7)
        assert body["stream"] and body["stream_options"] == {"include_usage": True}
    out, error = capsys.readouterr()
    assert out == "you said one\nBe brief.\nyou said two\nyou said three\n" and error == ""


def test_commands_are_listed_and_a_wrong_one_is_refused_with_the_nearest(
    type_lines: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    type_lines("/help", "/rest", "/system", "/exit", "never asked")
    with serving(echo) as server:
        assert main(["chat", f"{server.url}/v1"]) == 0
    out, error = capsys.readouterr()
    assert server.bodies == []
    assert [line.split()[0] for line in out.splitlines()[:4]] == [
        *("/help", "/reset", "/system", "/exit"),
    ]
    assert out.splitlines()[4] == "there is no system message"
    assert error == "enginehouse chat: there is no command /rest; did you mean /reset?\n"


def test_no_control_character_of_the_model_reaches_the_terminal(
    type_lines: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """All 65 of Unicode's controls but newline and tab, and halves of surrogate pairs."""
    import unicodedata

    controls = "".join(c for c in map(chr, range(0x3000)) if unicodedata.category(c) == "Cc")
    assert len(controls) == 65
    type_lines("hello")
    with serving(lambda body: list(chunks(f"a{controls}b", "\x1b]0;title\x07c\ud83d"))) as server:
        assert main(["chat", server.url]) == 0
    assert capsys.readouterr().out == "a\t\nb]0;titlec\n"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (Refusal(401, b'{"error": {"message": "no such key"}}'), "HTTP 401: no such key"),
        (Refusal(502, b"<html>bad gateway</html>"), "HTTP 502: <html>bad gateway</html>"),
        (Refusal(500, b""), "HTTP 500: no reason is given"),
        (
            ['{"error": {"message": "the engine host stopped"}}', "[DONE]"],
            "error in the stream: the engine host stopped",
        ),
        (list(chunks("half"))[:2], "the connection ended before the answer did"),
        (["[1]"], "'[1]' is no chat.completion.chunk"),
        (['{"choices": 7}'], "is no chat.completion.chunk"),
    ],
    ids=["key", "gateway", "empty", "event", "cut", "list", "shape"],
)
def test_an_error_is_one_sentence_and_the_chat_goes_on(
    script: Any, message: str, type_lines: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    type_lines("bad", "good")
    answer = lambda body: script if body["messages"][-1]["content"] == "bad" else echo(body)  # noqa: E731
    with serving(answer) as server:
        assert main(["chat", server.url]) == 0
    out, error = capsys.readouterr()
    assert error.startswith("enginehouse chat: ") and message in error and error.count("\n") == 1
    assert out.splitlines()[-1] == "you said good"
    assert server.bodies[1]["messages"] == [said("user", "good")], "the failed one is not kept"


def test_the_key_is_the_flags_else_the_environments(
    type_lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(echo) as server:
        monkeypatch.setenv("OPENAI_API_KEY", "theirs")
        for flags in ([], [], ["--api-key", "given"]):
            type_lines("hello")
            assert main(["chat", server.url, *flags]) == 0
            monkeypatch.setenv("ENGINEHOUSE_API_KEY", "ours")
    assert server.keys == ["Bearer theirs", "Bearer ours", "Bearer given"]


def test_what_is_neither_a_server_nor_an_engine_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", str(tmp_path / "none")]) == 2
    assert "none is neither an engine directory nor an address" in capsys.readouterr().err
    with serving(echo) as server:
        pass  # nobody listens there any more
    assert main(["chat", server.url]) == 2
    error = capsys.readouterr().err
    assert f"{server.url} does not answer (Connection refused); is it running?" in error
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main(["chat", str(tmp_path / "empty")]) == 2
    error = capsys.readouterr().err
    assert "the server ended before it was ready; it said last: enginehouse serve: " in error
    [log] = tmp_path.glob("enginehouse-chat-*.log")
    assert f"(its log is {log})" in error and "manifest.json" in log.read_text()


def _hear_ctrl_c() -> None:
    """As in a terminal, also where this suite runs in a shell's background, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """`enginehouse chat` whose standard input and output are a terminal."""

    def __init__(self, *words: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "enginehouse.verbs.main", "chat", *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm", "PYTHONSAFEPATH": "1"},
            preexec_fn=_hear_ctrl_c,
        )
        os.close(slave)
        self._seen = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def until(self, wanted: str) -> str:
        """What is shown up to `wanted`, since the last time."""
        while wanted not in self._seen:
            ready, _, _ = select.select([self._master], [], [], DEADLINE_S)
            assert ready, f"{wanted!r} never came, but {self._seen!r}"
            self._seen += os.read(self._master, 4096).decode()
        shown, _, self._seen = self._seen.partition(wanted)
        return shown + wanted

    def interrupt_until_it_ends(self) -> int:
        """Ctrl-C as a person presses it: again where the prompt was not listening, and not while it
        leaves.
        """
        for _ in range(DEADLINE_S):
            self.process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                return self.process.wait(1.0)
        raise AssertionError("it never ended")

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def test_a_terminal_shows_reasoning_and_figures_dimmed_and_ctrl_c_stops_an_answer() -> None:
    def script(body: dict[str, Any]) -> list[str]:
        if body["messages"][-1]["content"] == "forever":
            return [*list(chunks("and on"))[:2], WAIT]
        return list(chunks("the ", "answer", reasoning_content="a thought"))

    with serving(script) as server, Terminal(server.url) as terminal:
        assert server.url in terminal.until("/help lists the commands")
        terminal.until("> ")
        terminal.type("hello\n")
        assert "\x1b[2ma thought\x1b[0m\r\nthe answer\r\n" in terminal.until("answer\r\n")
        line = terminal.until("> ")
        assert line.startswith("\x1b[2m2 tokens, ") and " tokens/s, stop, $0.0000125\x1b[0m" in line
        terminal.type("forever\n")
        terminal.until("and on")
        terminal.process.send_signal(signal.SIGINT)
        assert "\x1b[2mstopped\x1b[0m" in terminal.until("> ")
        assert server.closed.wait(DEADLINE_S), "the connection was closed: the server cancels"
        terminal.type("again\n")
        terminal.until("> ")
        assert terminal.interrupt_until_it_ends() == 0, "at the prompt, it leaves"
    history = server.bodies[-1]["messages"]
    assert history[2:4] == [said("user", "forever"), said("assistant", "and on")], "what was said"


# Is ready, fails on the first question, and ends at the second.
FAILING = """
import http.server, json, os, sys

class Handler(http.server.BaseHTTPRequestHandler):
    asked = []

    def do_GET(self):
        self.answer(200, {"data": [{"id": "m"}]})

    def do_POST(self):
        self.asked.append(self.path)
        if len(self.asked) == 2:
            print("no memory is left", flush=True)
            os._exit(1)
        self.answer(503, {"error": {"message": "the engine host stopped"}})

    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words):
        pass

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_of_ones_own_that_fails_in_mid_chat_is_told_with_its_log(
    type_lines: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start = OwnServer.__init__

    def start_failing(self: OwnServer, command: object, port: int, log: Path) -> None:
        start(self, [sys.executable, "-c", FAILING, str(port)], port, log)

    monkeypatch.setattr(OwnServer, "__init__", start_failing)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    type_lines("one", "two", "three")
    assert main(["chat", str(tmp_path)]) == 2
    first, second = capsys.readouterr().err.splitlines()[-2:]
    [log] = tmp_path.glob("enginehouse-chat-*.log")
    assert first == (
        f"enginehouse chat: HTTP 503: the engine host stopped (the server's log is {log})"
    )
    assert second == (
        f"enginehouse chat: the server ended; it said last: no memory is left (its log is {log})"
    )


def test_a_chat_that_is_terminated_or_killed_ends_its_server(
    tmp_path: Path,
) -> None:
    """In a process of its own, whose server writes its process id and waits."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from enginehouse.server.client.own_server import OwnServer\n"
        "from enginehouse.verbs import chat\n"
        "start = OwnServer.__init__\n"
        "waiting = 'import os, signal; print(os.getpid(), flush=True); signal.pause()'\n"
        "OwnServer.__init__ = lambda self, command, port, log: start(\n"
        "    self, [sys.executable, '-c', waiting], port, Path(sys.argv[2]))\n"
        "chat.main([sys.argv[1]])\n"
    )
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGKILL):
        log = tmp_path / number.name
        log.touch()
        with subprocess.Popen([sys.executable, "-c", code, tmp_path, log]) as process:
            while not log.read_text().endswith("\n"):
                assert process.poll() is None
                select.select([], [], [], 0.02)
            server = psutil.Process(int(log.read_text()))
            process.send_signal(number)
            process.wait(DEADLINE_S)
        gone, _ = psutil.wait_procs([server], timeout=DEADLINE_S)
        assert gone == [server]

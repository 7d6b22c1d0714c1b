"""`bench`: what it asks and prints, what fails a run, and whom it loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from doubles.scripted_http import Refusal, ScriptedServer, chunks, serving
from enginehouse.server.client.load import PROMPTS
from enginehouse.verbs.main import main


def words_of(body: dict[str, Any]) -> list[str]:
    """The answer that an honest server gives: the prompt, backwards."""
    return [f"{word} " for word in reversed(body["messages"][0]["content"].split())]


def honest() -> Callable[[dict[str, Any]], list[str]]:
    numbers = count()
    return lambda body: list(chunks(*words_of(body), id=f"chatcmpl-{next(numbers)}"))


def bench(server: ScriptedServer, *flags: str, figures: Path) -> tuple[int, dict[str, Any]]:
    words = ["bench", server.url, "--rounds", "2", "--json", str(figures), *flags]
    return main(words), json.loads(figures.read_text()) if figures.exists() else {}


def test_an_honest_server_passes_and_its_tokens_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(honest()) as server:
        status, figures = bench(server, "--clients", "1", "4", figures=tmp_path / "f.json")
    assert status == 0, capsys.readouterr()
    assert figures["faults"] == [] and figures["model"] == "scripted" and figures["ignore_eos"]
    for level, clients in zip(figures["levels"], (1, 4), strict=True):
        tokens = sum(len(prompt.split()) for prompt in PROMPTS[:clients])
        assert (level["clients"], level["streams"], level["broken"]) == (clients, 2 * clients, 0)
        assert (level["equal"], level["num_tokens"]) == (2 * clients, 2 * tokens)
        assert level["common_share_min"] == 1 and level["tokens_per_s"] > 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith(f"{server.url}: scripted, up to 64 tokens each; ")
    assert "every stream was well formed" in out
    assert len(server.bodies) == 1 + 4 + 2 * (1 + 4), "a question of ignore_eos, alone, rounds"
    assert all(body.get("ignore_eos") for body in server.bodies)


@pytest.mark.parametrize("how", ["refused", "ignored"])
def test_a_server_without_ignore_eos_is_asked_without_it(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = honest()

    def script(body: dict[str, Any]) -> list[str] | Refusal:
        if how == "refused" and "ignore_eos" in body:
            return Refusal(400, b'{"error": {"message": "ignore_eos is not known"}}')
        return answer(body)

    with serving(script) as server:
        server.ignored_fields = "ignore_eos" if how == "ignored" else ""
        status, figures = bench(server, "--clients", "1", figures=tmp_path / "f.json")
    assert status == 0 and not figures["ignore_eos"]
    assert [body.get("ignore_eos") for body in server.bodies[1:]] == [None] * 3
    assert "ends an answer early" in capsys.readouterr().out


def test_a_shared_id_fails_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda body: list(chunks(*words_of(body)))) as server:
        status, figures = bench(server, "--clients", "2", figures=tmp_path / "f.json")
    assert status == 1 and "client 1: id chatcmpl-1 was another stream's" in figures["faults"]
    assert "FAILED client 1: id chatcmpl-1" in capsys.readouterr().err


def test_a_stream_that_breaks_under_load_fails_the_run_and_ends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer, asked = honest(), count()
    broken = lambda body: answer(body)[: None if next(asked) < 3 else -1]  # noqa: E731
    with serving(broken) as server:
        status, figures = bench(server, "--clients", "2", "4", figures=tmp_path / "f.json")
    fault = "the stream ended without [DONE]"
    assert status == 2, "alone, the fourth prompt broke already"
    assert fault in capsys.readouterr().err and figures == {}
    answer, asked = honest(), count()
    broken = lambda body: answer(body)[: None if next(asked) < 5 else -1]  # noqa: E731
    with serving(broken) as server:
        status, figures = bench(server, "--clients", "4", "2", figures=tmp_path / "f.json")
    assert status == 1 and len(figures["faults"]) == 4 and len(figures["levels"]) == 1
    assert all(text.endswith(fault) for text in figures["faults"])


def test_only_this_machine_is_loaded_unless_it_is_allowed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Names are refused too: where they lead is not known. TEST-NET-1 leads nowhere."""
    for url in ("http://192.0.2.1:8000", "http://example.test", "http://[2001:db8::1]:80"):
        assert main(["bench", url]) == 2
        assert "is not this machine; give --allow-remote" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--clients", "33"], "33 is out of range; wanted 1 to 32"),
        (["--tokens", "0"], "0 is out of range; wanted 1 to 100000"),
        (["--timeout", "1e9"], "1e9 is out of range; wanted 1 to 86400"),
    ],
)
def test_a_load_has_limits(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["bench", *words])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://", "http://a:b"])
def test_what_is_no_address_is_refused(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", url]) == 2
    assert f"{url} is no address of a server" in capsys.readouterr().err

"""The script that talks to a server with other people's clients."""

from __future__ import annotations

import runpy
import sys

import pytest

from makers.paths import ROOT

CLIENTS = {"openai": "openai", "langchain": "langchain_openai", "litellm": "litellm"}


def test_clients_that_are_not_installed_are_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "client_transcripts.py"))
    for module in CLIENTS.values():
        monkeypatch.setitem(sys.modules, module, None)
    assert script["main"]([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(CLIENTS)
    assert all("not installed" in line for line in lines)


def test_a_server_that_is_not_there_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "client_transcripts.py"))
    assert script["main"](["--client", "openai", "--base-url", "http://127.0.0.1:9/v1"]) == 1
    assert "APIConnectionError" in capsys.readouterr().err

"""Codex and Claude Code against this server, offline: `python scripts/agent_transcripts.py ENGINE`.

Each is to read a file and to edit it. The server is the whole application with the engine's
template and tokenizer; its engine is scripted, and answers with the calls that a model would make,
as it is the server that is tried and not a model. The programs are npm's, installed into
.cache/agents (0.7 GB). Printed are what each said, and what of its requests had no effect. The exit
status is 1 when a file was not edited.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gevent import monkey

monkey.patch_all()  # the server answers while an agent is waited for

from gevent.pywsgi import WSGIServer  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from enginehouse.runtime.engine import read_engine  # noqa: E402
from enginehouse.runtime.request import (  # noqa: E402
    EngineInfo,
    ExecutorStats,
    FinishReason,
    SamplingParams,
    TokenOutput,
)
from enginehouse.server.app import create_app  # noqa: E402
from enginehouse.server.settings import ServerSettings  # noqa: E402

AGENTS = Path(__file__).resolve().parents[1] / ".cache" / "agents"
TASK = "Read a.txt and replace old by new."
MODEL = "scripted"
_MOST_S = 120
_RESULT = "Result of "  # how a result of a call stands in a prompt of this tool format


class Agent(NamedTuple):
    """package: npm's. turns: what the engine answers, by the number of results in the prompt."""

    package: str
    turns: tuple[Any, ...]


def agents(folder: Path) -> dict[str, Agent]:
    path = str(folder / "a.txt")
    done = "I replaced old by new."
    shell = [{"cmd": "cat a.txt"}, {"cmd": "sed -i s/old/new/ a.txt"}]
    edit = {"file_path": path, "old_string": "old", "new_string": "new"}
    return {
        "codex": Agent(
            "@openai/codex",
            (*({"name": "exec_command", "arguments": asked} for asked in shell), done),
        ),
        "claude": Agent(
            "@anthropic-ai/claude-code",
            (
                {"name": "Read", "arguments": {"file_path": path}},
                {"name": "Edit", "arguments": edit},
                done,
            ),
        ),
    }


class Playing:
    """One answer, all of it at once."""

    begun = has_output = True

    def __init__(self, token_ids: list[int]) -> None:
        self._left: list[TokenOutput] = [
            TokenOutput(1, token_ids=token_ids, finish_reason=FinishReason.STOP)
        ]

    @property
    def finished(self) -> bool:
        return not self._left

    def get(self, timeout_s: float | None = None) -> tuple[int, TokenOutput] | None:
        return (0, self._left.pop()) if self._left else None

    def cancel(self, index: int | None = None) -> None:
        self._left.clear()


class ScriptedEngine:
    ready, stands_still, stats = True, False, ExecutorStats()

    def __init__(self, info: EngineInfo, tokenizer: Any) -> None:
        self.info = info
        self.turns: tuple[Any, ...] = ()
        self._tokenizer = tokenizer

    def check_room(self) -> None:
        """There is always some."""

    def submit(
        self,
        prompt_ids: list[int],
        samplings: list[SamplingParams],
        priority: int = 0,
        label: str = "",
    ) -> Playing:
        text = self._tokenizer.decode(prompt_ids, skip_special_tokens=False)
        turn = self.turns[min(text.count(_RESULT), len(self.turns) - 1)]
        said = turn if isinstance(turn, str) else json.dumps(turn)
        print(f"  prompt of {len(prompt_ids)} tokens -> {said}", flush=True)
        return Playing(self._tokenizer.encode(said, add_special_tokens=False).ids)


def command(name: str, port: int) -> tuple[list[str], dict[str, str]]:
    """The lines of docs/clients.md."""
    program = str(AGENTS / "node_modules" / ".bin" / name)
    if name == "codex":
        server = (
            f'{{name="enginehouse",base_url="http://127.0.0.1:{port}/v1",wire_api="responses"}}'
        )
        settings = [f"model_providers.enginehouse={server}", "model_provider=enginehouse"]
        settings.append('web_search="disabled"')
        flags = [word for each in settings for word in ("-c", each)]
        asked = ["exec", "--skip-git-repo-check", "-s", "danger-full-access", *flags, "-m", MODEL]
        return [program, *asked, TASK], {}
    server = f"http://127.0.0.1:{port}"
    env = {"ANTHROPIC_BASE_URL": server, "ANTHROPIC_AUTH_TOKEN": "-", "ANTHROPIC_MODEL": MODEL}
    env |= {"ANTHROPIC_SMALL_FAST_MODEL": MODEL, "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}
    return [program, "-p", TASK, "--allowedTools", "Read,Edit"], env


def run(name: str, port: int, folder: Path, home: Path) -> bool:
    """Whether the file was edited."""
    (folder / "a.txt").write_text("old\n")
    words, env = command(name, port)
    own = {"HOME": str(home), "CODEX_HOME": str(home), "CLAUDE_CONFIG_DIR": str(home)}
    done = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, **own, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_MOST_S,
    )
    for line in (done.stdout or done.stderr).strip().splitlines()[-12:]:
        print(f"  | {line}")
    edited = (folder / "a.txt").read_text() == "new\n"
    print(f"  {name}: status {done.returncode}, the file is {'edited' if edited else 'NOT edited'}")
    return edited and done.returncode == 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", type=Path)
    parser.add_argument("--agent", choices=list(agents(Path())), action="append")
    args = parser.parse_args(argv)
    if shutil.which("npm") is None:
        print("npm is not installed: nothing is tried")
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder, home = Path(name, "work"), Path(name, "home")
        folder.mkdir()
        home.mkdir()
        chosen = {k: v for k, v in agents(folder).items() if not args.agent or k in args.agent}
        packages = [agent.package for agent in chosen.values()]
        AGENTS.mkdir(parents=True, exist_ok=True)
        install = ["npm", "install", "--no-fund", "--no-audit", "--silent", *packages]
        subprocess.run(install, cwd=AGENTS, check=True)
        settings = ServerSettings(args.engine, "ipc://none", MODEL, tool_format="json")
        tokenizer = Tokenizer.from_file(str(args.engine / "tokenizer.json"))
        engine = ScriptedEngine(_info(args.engine), tokenizer)
        app = create_app(settings, engine)
        server = WSGIServer(("127.0.0.1", 0), _told(app), log=None)
        server.start()
        edited = []
        for agent_name, agent in chosen.items():
            print(f"{agent_name}:", flush=True)
            engine.turns = agent.turns
            edited.append(run(agent_name, server.address[1], folder, home))
        server.stop()
    return 0 if all(edited) else 1


def _info(engine: Path) -> EngineInfo:
    config = read_engine(engine).config
    return EngineInfo(
        *("scripted", MODEL, "none", "none", 1, 1, 1_000_000, 8, 8192, config.vocab_size, 32),
        *(1024, 1 << 30, (), "sha256:0", 0),
    )


def _told(app: Any) -> Any:
    """The application, saying of each answer its status and the fields that had no effect."""

    def application(environ: dict[str, Any], start: Any) -> Any:
        def begin(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            ignored = dict(headers).get("X-Ignored-Fields", "")
            asked = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}: {status}"
            print(f"  {asked}{', ignored: ' if ignored else ''}{ignored}", flush=True)
            return start(status, headers, *more)

        return app(environ, begin)

    return application


if __name__ == "__main__":
    sys.exit(main())

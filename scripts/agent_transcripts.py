"""Codex and Claude Code against this server, offline: `python scripts/agent_transcripts.py`.

Each is to read a file and to edit it. The server is that of scripts/scripted: its engine answers
with the calls that a model would make, as it is the server that is tried and not a model. The
programs are npm's, installed into .cache/agents (0.7 GB). Printed are what each said, and what of
its requests had no effect. The exit status is 1 when a file was not edited; without npm, or what it
should get, that is said and nothing is tried.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which PYTHONSAFEPATH leaves out

from packages import NotHere, npm_install  # noqa: E402
from scripted.answers import call  # noqa: E402
from scripted.process import MODEL, scripted_server  # noqa: E402

AGENTS = Path(__file__).resolve().parents[1] / ".cache" / "agents"
CONFIGURED = Path(__file__).resolve().parent / "agents"
TASK = "Read a.txt and replace old by new."
_MOST_S = 120


class Agent(NamedTuple):
    """package: npm's. turns: what the engine answers, by the number of results in the prompt."""

    package: str
    turns: tuple[str, ...]


def agents(folder: Path) -> dict[str, Agent]:
    path = str(folder / "a.txt")
    done = "I replaced old by new."
    shell = [call("exec_command", cmd=cmd) for cmd in ("cat a.txt", "sed -i s/old/new/ a.txt")]
    read = call("Read", file_path=path)
    edit = call("Edit", file_path=path, old_string="old", new_string="new")
    return {
        "codex": Agent("@openai/codex", (*shell, done)),
        "claude": Agent("@anthropic-ai/claude-code", (read, edit, done)),
    }


def command(name: str, server: str, home: Path) -> list[str]:
    """What asks an agent to do its task, configured by the lines of docs/clients.md."""
    program = str(AGENTS / "node_modules" / ".bin" / name)
    if name == "codex":
        (home / "config.toml").write_text(_configured("codex.toml", server))
        return [program, "exec", "--skip-git-repo-check", "-s", "danger-full-access", TASK]
    lines = f'{_configured("claude.sh", server)}exec "$0" "$@"'
    return ["sh", "-c", lines, program, "-p", TASK, "--allowedTools", "Read,Edit"]


def _configured(file: str, server: str) -> str:
    text = (CONFIGURED / file).read_text()
    return text.replace("http://127.0.0.1:8000", server).replace("NAME", MODEL)


def run(name: str, server: str, folder: Path, home: Path) -> bool:
    """Whether the file was edited."""
    (folder / "a.txt").write_text("old\n")
    own = {"HOME": str(home), "CODEX_HOME": str(home), "CLAUDE_CONFIG_DIR": str(home)}
    done = subprocess.run(
        command(name, server, home),
        cwd=folder,
        env={**os.environ, **own},
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
    parser.add_argument("--agent", choices=list(agents(Path())), action="append")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder, home = Path(name, "work"), Path(name, "home")
        folder.mkdir()
        home.mkdir()
        chosen = {k: v for k, v in agents(folder).items() if not args.agent or k in args.agent}
        AGENTS.mkdir(parents=True, exist_ok=True)
        try:
            npm_install(AGENTS, *(agent.package for agent in chosen.values()))
        except NotHere as missing:
            print(f"no agent is tried: {missing}")
            return 0
        edited = []
        for agent_name, agent in chosen.items():
            print(f"{agent_name}:", flush=True)
            with scripted_server(agent.turns) as server:
                edited.append(run(agent_name, server, folder, home))
    return 0 if all(edited) else 1


if __name__ == "__main__":
    sys.exit(main())

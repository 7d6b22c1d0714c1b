"""configs/ci/: the shell recipe with a stand-in for the program, and the two files that call it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from makers.paths import ROOT

FOLDER = ROOT / "configs" / "ci"
RECIPE = FOLDER / "regress.sh"
HOSTED = ("github-actions.yml", "gitlab-ci.yml")
MARKER = "<!-- enginehouse regress -->"

# Notes what it was asked, makes what it would make, and ends with the status that it is told.
PROGRAM = """#!/bin/sh
echo "enginehouse $*" >> "$ASKED"
case $1 in
build) mkdir -p "$4"; echo built > "$4/manifest.json"; exit "${BUILD_STATUS:-0}" ;;
regress)
  if [ "$2" = run ] && [ "${RUN_STATUS:-0}" != 2 ]; then
    mkdir -p "$7"; printf '%s\\nfound\\n' "$MARKER" > "$7/report.md"
  fi
  exit "${RUN_STATUS:-0}" ;;
esac
"""
# GitHub's program and curl: both answer with the comments that there are.
GH = """#!/bin/sh
echo "gh $*" >> "$ASKED"
case "$*" in *--paginate*) test "$MARKER" && printf '%b' "$FOUND" ;; esac
"""
CURL = """#!/bin/sh
echo "curl $*" >> "$ASKED"
case "$*" in *PUT*|*POST*) ;; *) printf '%s' "$FOUND" ;; esac
"""


class Recipe:
    """regress.sh in a folder of its own, where programs stand in for all that it calls."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, folder / "asked"
        for name, text in (("enginehouse", PROGRAM), ("gh", GH), ("curl", CURL)):
            program = folder / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(text, encoding="utf-8")
            program.chmod(0o755)

    def __call__(self, verb: str, **variables: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        own = {"PATH": path, "ASKED": str(self.asked), "MARKER": MARKER}
        return subprocess.run(
            [RECIPE, verb],
            cwd=self.folder,
            env={**own, "ENGINEHOUSE": "enginehouse", **variables},
            capture_output=True,
            text=True,
            timeout=30,
        )

    def calls(self) -> list[str]:
        calls = self.asked.read_text(encoding="utf-8").splitlines()
        self.asked.unlink()
        return calls


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe(tmp_path)


@pytest.mark.parametrize("status", [0, 1, 2, 3])
def test_run_builds_judges_and_ends_as_the_judge_does(recipe: Recipe, status: int) -> None:
    (recipe.folder / "base line").mkdir()
    summary = recipe.folder / "summary"
    (recipe.folder / "out").mkdir()
    (recipe.folder / "out" / "report.md").write_text("an earlier run's")
    done = recipe(
        "run",
        **{"MODEL": "owner/name", "QUANT": "int4", "TP": "2", "BACKEND": "torch"},
        **{
            "BASELINE": "base line",
            "REPORTS": "out",
            "CANNOT_TELL": "pass",
            "ONLY": "numerics speed",
        },
        **{"RUN_STATUS": str(status), "GITHUB_STEP_SUMMARY": str(summary)},
    )
    assert done.returncode == status, done.stderr
    assert recipe.calls() == [
        "enginehouse build owner/name -o engines/new --quant int4 --tp 2 --backend torch",
        "enginehouse regress run engines/new --baseline base line --out out "
        "--only numerics speed --cannot-tell pass",
    ]
    if status == 2:  # an earlier run's report is not this one's
        assert not summary.exists() and not (recipe.folder / "out" / "report.md").exists()
    else:
        assert summary.read_text(encoding="utf-8") == f"{MARKER}\nfound\n"


def test_an_engine_that_is_there_is_not_built(recipe: Recipe) -> None:
    for name in ("mine", "old"):
        (recipe.folder / name).mkdir()
    assert recipe("run", ENGINE="mine", BASELINE="old").returncode == 0
    [call] = recipe.calls()
    assert call == "enginehouse regress run mine --baseline old --out regress-reports"


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"MODEL": "m", "BUILD_STATUS": "3"}, "building engines/new from m ended with status 3"),
        ({}, "there is no engine engines/new: give MODEL, or ENGINE that was built"),
        ({"MODEL": "m"}, "there is no baseline engines/baseline: make it with record or keep"),
        ({"ENGINEHOUSE": "no-such-program"}, "no-such-program is not installed: run make ready"),
    ],
)
def test_what_could_not_run_is_status_2_and_a_sentence(
    recipe: Recipe, variables: dict[str, str], sentence: str
) -> None:
    done = recipe("run", **variables)
    assert (done.returncode, done.stderr) == (2, f"regress.sh: {sentence}\n")


def test_a_baseline_is_recorded_or_kept_whole(recipe: Recipe) -> None:
    assert recipe("record", MODEL="m", BASELINE="baseline").returncode == 0
    assert recipe.calls()[1] == "enginehouse regress record engines/new -o baseline"
    (recipe.folder / "kept").mkdir()
    (recipe.folder / "kept" / "stale").touch()
    assert recipe("keep", MODEL="m", BASELINE="kept").returncode == 0
    assert [path.name for path in (recipe.folder / "kept").iterdir()] == ["manifest.json"]
    assert recipe("keep", MODEL="m", BUILD_STATUS="2", BASELINE="kept").returncode == 2
    assert (recipe.folder / "kept" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("found", "call"),
    [
        ("", "--method POST repos/o/r/issues/12/comments"),
        ("77\\n88\\n", "--method PATCH repos/o/r/issues/comments/77"),
    ],
)
def test_a_pull_request_has_one_comment(recipe: Recipe, found: str, call: str) -> None:
    (recipe.folder / "regress-reports").mkdir()
    (recipe.folder / "regress-reports" / "report.md").write_text(f"{MARKER}\n", encoding="utf-8")
    done = recipe("comment", GITHUB_REF="refs/pull/12/merge", GITHUB_REPOSITORY="o/r", FOUND=found)
    assert done.returncode == 0, done.stderr
    asked, sent = recipe.calls()
    assert "repos/o/r/issues/12/comments?per_page=100" in asked
    assert sent == f"gh api --silent {call} -F body=@regress-reports/report.md"


@pytest.mark.parametrize(
    ("found", "call"),
    [
        ('[{"id": 5, "body": "other"}]', "POST"),
        (f'[{{"id": 5, "body": "other"}}, {{"id": 7, "body": "{MARKER} ..."}}]', "PUT"),
    ],
)
def test_a_merge_request_has_one_comment(recipe: Recipe, found: str, call: str) -> None:
    (recipe.folder / "out").mkdir()
    (recipe.folder / "out" / "report.md").write_text(f"{MARKER}\n", encoding="utf-8")
    variables = {"CI_API_V4_URL": "https://g/api", "CI_PROJECT_ID": "3", "FOUND": found}
    done = recipe(
        "comment", REPORTS="out", CI_MERGE_REQUEST_IID="9", REGRESS_TOKEN="secret", **variables
    )
    assert done.returncode == 0, done.stderr
    asked, sent = recipe.calls()
    assert asked.endswith("https://g/api/projects/3/merge_requests/9/notes?per_page=100")
    end = "/7" if call == "PUT" else ""
    assert f"--request {call} --data-urlencode body@out/report.md" in sent
    assert sent.endswith(f"https://g/api/projects/3/merge_requests/9/notes{end}")
    assert "secret" not in asked + sent


def test_a_comment_wants_a_report_and_a_request(recipe: Recipe) -> None:
    done = recipe("comment")
    assert (done.returncode, "run comes before comment" in done.stderr) == (2, True)
    (recipe.folder / "regress-reports").mkdir()
    (recipe.folder / "regress-reports" / "report.md").write_text(f"{MARKER}\n", encoding="utf-8")
    done = recipe("comment")
    assert (done.returncode, "names a request to comment on" in done.stderr) == (2, True)
    assert recipe("tidy").returncode == 2


def shell_of(node: Any) -> list[str]:
    """Every command of a pipeline's description, wherever it stands."""
    if isinstance(node, list):
        return [command for item in node for command in shell_of(item)]
    if not isinstance(node, dict):
        return []
    found = []
    for key, value in node.items():
        if key in ("run", "script", "before_script", "after_script"):
            found += [value] if isinstance(value, str) else list(value)
        else:
            found += shell_of(value)
    return found


@pytest.mark.parametrize("name", HOSTED)
def test_a_hosted_recipe_calls_what_is_there(name: str) -> None:
    described = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    commands = shell_of(described)
    verbs = re.findall(r"configs/ci/regress\.sh (\w+)", "\n".join(commands))
    assert sorted(verbs) == ["comment", "keep", "run"]
    targets = re.findall(r"\bmake ([\w-]+)", "\n".join(commands))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets and all(re.search(f"^{target}:", makefile, re.M) for target in targets)
    for command in commands:
        assert subprocess.run(["bash", "-n", "-c", command], timeout=10).returncode == 0
        assert "${{" not in command, "what a pull request names must not become a command"


@pytest.mark.parametrize("name", HOSTED)
def test_a_hosted_recipe_sets_variables_that_the_script_reads(name: str) -> None:
    described = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    variables = described["env" if name.startswith("github") else "variables"]
    script = RECIPE.read_text(encoding="utf-8")
    told = "\n".join(line for line in script.splitlines() if line.startswith("#"))
    for variable in variables:
        assert re.search(rf"\b{variable}\b", told), f"{variable} is not explained"
        assert f"${{{variable}:" in script, f"{variable} is not read"


def test_gitlab_keeps_what_the_recipe_writes() -> None:
    described = yaml.safe_load((FOLDER / "gitlab-ci.yml").read_text(encoding="utf-8"))
    variables, job = described["variables"], described["regress"]
    assert job["artifacts"]["paths"] == [f"{variables['REPORTS']}/"]
    assert job["artifacts"]["reports"]["junit"] == f"{variables['REPORTS']}/junit.xml"
    assert job["allow_failure"]["exit_codes"] == [3]
    for name, policy in (("regress", "pull"), ("regress-baseline", "push")):
        cache = described[name]["cache"]
        assert (cache["paths"], cache["policy"]) == ([variables["BASELINE"]], policy)


def test_the_script_is_one_that_bash_reads() -> None:
    assert os.access(RECIPE, os.X_OK)
    assert subprocess.run(["bash", "-n", RECIPE], timeout=10).returncode == 0


def test_the_recipe_builds_keeps_and_judges_an_engine(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """As a CI would: an engine is kept, built again, judged beside the one that was kept."""
    suite, limits = tmp_path / "suite.yaml", tmp_path / "limits.yaml"
    suite.write_text("prompts: [{name: p, prompt: A whistle, max_tokens: 6}]\n")
    limits.write_text(
        "turns: {clients: [1], tokens: 8, least: 2, most: 2, to_differ: 2, starts: 1}\n"
        "speed: {tokens_per_s: 0.99, ttft_ms: 0.99, step_ms: 0.99, start_s: 0.99}\n"
    )
    program = Path(sys.executable).parent / "enginehouse"
    own = {"MODEL": str(tiny_checkpoint), "QUANT": "int4", "ENGINEHOUSE": str(program)}
    own |= {
        "SUITE": str(suite),
        "LIMITS": str(limits),
        "CANNOT_TELL": "pass",
        "ONLY": "numerics speed",
    }
    for verb in ("keep", "run"):
        done = subprocess.run(
            [RECIPE, verb],
            cwd=tmp_path,
            env={**os.environ, **own},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    reports = tmp_path / "regress-reports"
    assert {path.name for path in reports.iterdir()} == {
        *("junit.xml", "report.html", "report.md", "report.json")
    }
    assert "Both hold the same files" in (reports / "report.md").read_text()

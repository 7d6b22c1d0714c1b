"""What is installed serves: the wheel in an environment that no checkout is part of."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from makers.engines import QUICKEST, EngineMaker
from makers.gunicorn_server import Server
from makers.wheel import build_wheel


class InstalledServer(Server):
    """`enginehouse serve` of an environment that no checkout is part of, told in flags."""

    def __init__(self, environment: Path, engine: Path, log: Path) -> None:
        self.environment = environment
        super().__init__(engine, log)

    def command(self, engine: Path) -> list[str | Path]:
        flags = ["--max-seq-len", "256", "--max-batch-size", "3", "--max-num-tokens", "32"]
        flags += ["--kv-cache-gib", "0.01", "--log-level", "warning", "--access-log", "1"]
        front_door = self.environment / "bin" / "enginehouse"
        return [front_door, "serve", engine, "--port", str(self.port), *flags]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel in it; what it depends on is this environment's own."""
    folder = tmp_path_factory.mktemp("installed")
    path = folder / "environment"
    venv.create(path, symlinks=True)
    python = path / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    subprocess.run([*command, "--no-index", build_wheel(folder)], check=True, timeout=120)
    [packages] = path.glob("lib/python*/site-packages")
    own = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "dependencies.pth").write_text("\n".join(sorted(own)) + "\n", encoding="utf-8")
    gunicorn = path / "bin" / "gunicorn"
    gunicorn.write_text(f"#!{python}\nfrom gunicorn.app.wsgiapp import run\n\nrun()\n")
    gunicorn.chmod(0o755)
    return path


def test_the_wheel_serves_without_the_checkout(
    installed: Path, make_engine: EngineMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    where = "import enginehouse.runtime.errors as found; print(found.__file__)"
    told = subprocess.run(
        [installed / "bin" / "python", "-c", where], capture_output=True, text=True, check=True
    )
    assert Path(told.stdout.strip()).is_relative_to(installed)
    server = InstalledServer(installed, make_engine(**QUICKEST), tmp_path / "log")
    try:
        with server.client() as client:
            answer = client.completions.create(model="tiny-llama", prompt=[5, 6, 7], max_tokens=4)
            usage = answer.usage
            assert usage is not None and usage.prompt_tokens == 3
            assert client.models.list().data[0].max_model_len == 256  # type: ignore[attr-defined]
        limit = server.metric("enginehouse_kv_cache_limit_bytes")
        assert 0 < 0.01 * 2**30 - limit < 2**16, "as asked, to a block"
    finally:
        assert server.stop() == 0
    log = server.log.read_text()
    tokens = re.escape(f"3 + {usage.completion_tokens} tokens")
    line = rf"enginehouse.traffic: POST /v1/completions 200 \d+ ms, {tokens}, id [0-9a-f]{{32}}\n"
    assert re.search(line, log), log
    assert "context       256 tokens" in log and "concurrency   3 requests" in log
    assert "KV memory     at most 10.2 MiB; remembered prefixes fill it in time" in log
    assert "Booting worker" not in log, "gunicorn's lines are of another level"

"""Do both sets of packages resolve for these Pythons? The resolver runs; no package is fetched.

    cpu       what `make install` brings, with the lock
    trtllm    the extra `trtllm`, with what tensorrt-llm 1.2.1 itself requires

tensorrt-llm and tensorrt are left out of the second: on PyPI they are source packages that fetch
gigabytes from NVIDIA's index while they are built. What they require stands below instead.
Needs a package index that serves metadata. Usage: check_resolve.py python3.10 python3.12
"""

from __future__ import annotations

import argparse
import configparser
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OF_EACH = {"cpu": ("3.10", "3.11", "3.12", "3.13"), "trtllm": ("3.10", "3.12")}
SHOWN = ("torch", "transformers", "tokenizers", "huggingface_hub", "numpy", "pydantic", "pyzmq")
# Source: the requirements of tensorrt-llm 1.2.1, but for those that are not in PyPI as wheels.
OF_TENSORRT_LLM = (
    "torch>=2.9.1,<=2.10.0a0",
    "transformers==4.57.3",
    "triton==3.5.1",
    "torchao>=0.14.1,<0.16",
    "flashinfer-python~=0.6.0",
    "nvidia-modelopt[torch]~=0.37.0",
    "cuda-python>=13",
    "pydantic>=2",
    "mpi4py",
    "pyzmq",
    "xgrammar",
    "llguidance",
)
_NOT_WHEELS = ("tensorrt-llm", "tensorrt")


def requirements(name: str) -> list[str]:
    """The lines of setup.cfg that a set is made of, environment markers included."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = ("test", "lint") if name == "cpu" else ("trtllm",)
    texts = [setup["options"]["install_requires"]]
    texts += [setup["options.extras_require"][extra] for extra in extras]
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    if name == "trtllm":
        lines = [line for line in lines if re.split("[=~;]", line)[0] not in _NOT_WHEELS]
        lines += OF_TENSORRT_LLM
    return lines


def make_pip(python: str, folder: Path) -> Path:
    """The Python of a new environment whose pip reads metadata without the package."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    own = folder / "bin" / "python"
    subprocess.run([str(own), "-m", "pip", "install", "-q", "-U", "pip>=23.3"], check=True)
    return own


def resolve(name: str, python: Path, folder: Path) -> dict[str, str]:
    """The versions that pip would install; RuntimeError with pip's words when there are none."""
    report, wanted = folder / f"{name}.json", folder / f"{name}.txt"
    wanted.write_text("\n".join(requirements(name)), encoding="utf-8")
    command = [str(python), "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"]
    command += ["--only-binary=:all:", "--report", str(report), "-r", str(wanted)]
    if name == "cpu":
        command += ["-c", str(ROOT / "constraints.txt")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise RuntimeError("\n".join(lines) or done.stderr)
    installed = json.loads(report.read_text(encoding="utf-8"))["install"]
    found = {item["metadata"]["name"]: item["metadata"]["version"] for item in installed}
    return {key.lower().replace("-", "_"): value for key, value in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pythons", nargs="*", default=[sys.executable], help="this one by default")
    parser.add_argument("--set", choices=tuple(OF_EACH), help="one set only")
    args = parser.parse_args()
    failed = False
    for python in args.pythons:
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            own = make_pip(python, folder / "venv")
            code = "import sys; print('%d.%d' % sys.version_info[:2])"
            version = subprocess.check_output([str(own), "-c", code], text=True).strip()
            for name, versions in OF_EACH.items():
                if version not in versions or args.set not in (None, name):
                    continue
                try:
                    found = resolve(name, own, folder)
                except RuntimeError as error:
                    failed = True
                    print(f"{name} on {version}: does not resolve\n{error}", flush=True)
                    continue
                shown = ", ".join(f"{key} {found[key]}" for key in SHOWN if key in found)
                print(f"{name} on {version}: {len(found)} packages; {shown}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Do both sets of packages resolve on every Python they are for? No package is fetched.

    cpu       what `make install` and the extra `compiler` bring, with the lock; does it hold all
    trtllm    the extra `trtllm`, with what tensorrt-llm 1.2.1 itself requires

tensorrt-llm and tensorrt are left out of the second: on PyPI they are source packages that fetch
gigabytes from NVIDIA's index while they are built. What they require stands below instead. uv
resolves for Linux on x86_64 and wants none of these Pythons here, but a package index that serves
metadata (PIP_INDEX_URL, else PyPI). torch is the index's own, which is the CUDA build on PyPI.
"""

from __future__ import annotations

import argparse
import configparser
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OF_EACH = {"cpu": ("3.10", "3.11", "3.12", "3.13"), "trtllm": ("3.10", "3.12")}
SHOWN = ("torch", "transformers", "tokenizers", "huggingface-hub", "numpy", "xgrammar", "pyzmq")
# Source: the requirements of tensorrt-llm 1.2.1; below the line, requirements.txt of its 1.2 line
# where 1.2.1's own was not seen. Left out: what is not in PyPI as wheels.
OF_TENSORRT_LLM = (
    "torch>=2.9.1,<=2.10.0a0",
    "transformers==4.57.3",
    "triton==3.5.1",
    "torchao>=0.14.1,<0.16",
    "flashinfer-python~=0.6.0",
    "nvidia-modelopt[torch]~=0.37.0",
    "cuda-python>=13",
    "mpi4py",
    "pyzmq",
    # ---
    "xgrammar==0.1.25",
    "numpy<2",
    "setuptools<80",
    "wheel<=0.45.1",
    "apache-tvm-ffi==0.1.6",
    "torch-c-dlpack-ext==0.1.3",
    "llguidance==0.7.29",
    "mistral-common==1.8.6",
    "openai-harmony==0.0.4",
    "datasets==3.1.0",
    "h5py==3.12.1",
    "onnx>=1.18.0,<1.20.0",
    "numexpr<2.14.0",
    "fastapi>=0.120.1,<=0.121.3",
    "starlette>=0.49.1",
    "accelerate>=1.7.0",
    "pydantic>=2.9.1",
    "pydantic-settings[yaml]",
    "prometheus_client",
    "psutil",
    "openai",
    "jsonschema",
)
_NOT_WHEELS = ("tensorrt-llm", "tensorrt")
_CUDA = re.compile(r"cuda-|nvidia-")  # torch's CUDA build pins these itself
_LIMIT_S = 300


def requirements(name: str) -> list[str]:
    """The lines of setup.cfg that a set is made of, environment markers included."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = ("test", "lint", "compiler") if name == "cpu" else ("trtllm",)
    texts = [setup["options"]["install_requires"]]
    texts += [setup["options.extras_require"][extra] for extra in extras]
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    if name == "trtllm":
        lines = [line for line in lines if re.split("[=~;]", line)[0] not in _NOT_WHEELS]
        lines += OF_TENSORRT_LLM
    return lines


def locked_names() -> set[str]:
    """The packages that constraints.txt pins."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {_canonical(line.partition("==")[0]) for line in lines if "==" in line}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def resolve(name: str, python: str) -> dict[str, str]:
    """The versions that would be installed; RuntimeError with uv's words when there are none."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "-", "--quiet", "--no-header"]
    command += ["--no-annotate", "--only-binary", ":all:", "--python-version", python]
    command += ["--python-platform", "x86_64-manylinux_2_28"]
    if name == "cpu":
        command += ["--constraints", str(ROOT / "constraints.txt")]
    if os.environ.get("PIP_INDEX_URL"):
        command += ["--default-index", os.environ["PIP_INDEX_URL"]]
    done = subprocess.run(
        command,
        input="\n".join(requirements(name)),
        env={"UV_SYSTEM_CERTS": "1", **os.environ},
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip())
    found = re.findall(r"^([\w.-]+)==(\S+)", done.stdout, re.M)
    return {_canonical(key): value for key, value in found}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", action="append", help="such as 3.12, may be repeated; else all")
    parser.add_argument("--set", choices=tuple(OF_EACH), help="one set only")
    args = parser.parse_args(argv)
    wanted = [
        (name, python)
        for name, pythons in OF_EACH.items()
        for python in pythons
        if args.set in (None, name) and (args.python is None or python in args.python)
    ]
    failed = False
    with ThreadPoolExecutor(len(wanted) or 1) as pool:
        results = [pool.submit(resolve, *each) for each in wanted]
    for (name, python), result in zip(wanted, results, strict=True):
        error = result.exception()
        if error is not None:
            failed = True
            print(f"{name} on {python}: does not resolve\n{error}", flush=True)
            continue
        found = result.result()
        shown = ", ".join(f"{key} {found[key]}" for key in SHOWN if key in found)
        print(f"{name} on {python}: {len(found)} packages; {shown}", flush=True)
        unpinned = {each for each in found.keys() - locked_names() if not _CUDA.match(each)}
        if name == "cpu" and unpinned:
            failed = True
            print(f"  constraints.txt pins no version of {', '.join(sorted(unpinned))}")
    if not wanted:
        print(f"no set is for {', '.join(args.python)}; wanted one of {', '.join(OF_EACH['cpu'])}")
    return int(failed or not wanted)


if __name__ == "__main__":
    sys.exit(main())

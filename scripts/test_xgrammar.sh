#!/usr/bin/env bash
# The tests of constraints with the oldest xgrammar we take, which TensorRT-LLM 1.2.1 pins: it lies
# in a folder before all others, one for each Python.
# Usage: scripts/test_xgrammar.sh PYTHON [PROCESSES]; PYTHON is the program.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
oldest=0.1.25
files=(tests/runtime/grammar/test_{constraint,support,vocabulary}.py
  tests/server/answer/test_choice.py tests/server/request/test_constraints.py
  tests/server/tools/test_tool_constraints.py)

version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $version in
  3.10 | 3.11 | 3.12 | 3.13) ;;
  *)
    echo "xgrammar $oldest has wheels for Python 3.10 to 3.13, and this is $version: nothing is" \
      "tested with it; make test-xgrammar PYTHON=python3.12 VENV=.venv-3.12"
    exit
    ;;
esac
folder=$PWD/.cache/xgrammar-$oldest-python$version
[[ -d $folder ]] || "$1" -m pip install -q --no-deps --only-binary :all: --target "$folder" \
  "xgrammar==$oldest"
PYTHONPATH=$folder exec "$1" -m pytest -n "${2:-2}" --dist loadfile "${files[@]}"

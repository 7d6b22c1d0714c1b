#!/usr/bin/env bash
# The tests that need no torch, on the Pythons that TensorRT-LLM has wheels for: schemas, templates,
# tools, streams, host, packaging; on all but the first the last two alone. Every file is compiled by
# them too. The whole suite takes
# `make test PYTHON=python3.12 VENV=.venv-3.12`, and gigabytes where the index has no torch for CPUs.
# Usage: scripts/test_others.sh UV [PYTHON ...]; UV is the program.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export UV_SYSTEM_CERTS=1
uv=$1
shift
packages=(flask gevent gunicorn hypothesis jinja2 jsonschema limits msgspec numpy openai packaging pip
  prometheus_client psutil pydantic pytest pytest-timeout pyyaml pyzmq regex setuptools tokenizers transformers wheel xxhash)
files=(tests/test_packaging.py tests/server/test_settings.py
  tests/runtime/batching/test_kv_cache.py tests/runtime/host/test_host.py
  tests/server/client/test_{connection,load,stream_reader}.py tests/verbs/test_bench.py
  tests/server/answer/test_{choice,completion}.py tests/server/http/test_{auth,cors,routes,sse}.py
  tests/server/api/test_{text_completion,completion_routes,tokenizer_info,tool_routes}.py
  tests/server/api/test_kept_responses.py
  tests/server/prompt/test_{chat,template}.py tests/server/text/test_{detokenizer,reasoning}.py
  tests/server/tools/test_verdict.py)

find_python() { # the program of a version: on PATH, else one of pyenv's
  local program folder
  folder=$(pyenv prefix "$1" 2>/dev/null) || folder=
  for program in "python$1" ${folder:+"$folder/bin/python"}; do
    if "$program" -c '' 2>/dev/null; then
      command -v "$program"
      return
    fi
  done
}

[[ $# -gt 0 ]] || set -- 3.10 3.12
oldest=$1
for python in "$@"; do
  program=$(find_python "$python")
  if [[ -z $program ]]; then
    echo "Python $python is not on this machine: nothing is tested with it"
    continue
  fi
  folder=.cache/pythons/$python
  "$uv" venv --quiet --no-python-downloads --allow-existing --python "$program" "$folder"
  "$uv" pip install --quiet --python "$folder/bin/python" -c constraints.txt "${packages[@]}"
  "$uv" pip install --quiet --python "$folder/bin/python" --no-deps -e .
  echo "Python $python: every file is compiled, and what needs no torch is tested"
  PYTHONPYCACHEPREFIX=.cache/compiled "$folder/bin/python" -m compileall -q \
    build runtime server scripts tests
  [[ $python == "$oldest" ]] || files=(tests/test_packaging.py tests/runtime/host/test_host.py)
  PYTHONPATH=tests "$folder/bin/python" -m pytest -q --noconftest -p makers.api_fixtures \
    -o cache_dir=".cache/pytest-$python" "${files[@]}"
done

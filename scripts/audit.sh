#!/usr/bin/env bash
# bandit over the code, and pip-audit over the lock where its service can be reached: neither is a
# dependency, so both lie in an environment of their own.
# Usage: scripts/audit.sh UV; UV is the program.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export UV_SYSTEM_CERTS=1
uv=$1 folder=.cache/audit
"$uv" venv --quiet --no-python-downloads --allow-existing "$folder"
"$uv" pip install --quiet --python "$folder/bin/python" bandit pip-audit
# Two rules are of strings: 0.0.0.0, which is told apart here, and /tmp, which is looked at for room.
"$folder/bin/bandit" --quiet --recursive --severity-level medium --skip B104,B108 \
  build runtime server scripts/verbs scripts/regress
echo "bandit: nothing of medium or high severity"
timeout 300 "$folder/bin/pip-audit" --requirement constraints.txt --no-deps --disable-pip || {
  status=$?
  [[ $status -ne 1 ]] || exit 1 # it found something
  echo "pip-audit: its service was not reached (status $status); nothing is known of the packages"
}

#!/usr/bin/env bash
# Serve an engine from this checkout: scripts/launch.sh engines/mine [--nodes 2] [--dry-run]
# One GPU, one node or several nodes; prints the command it runs. --help lists the choices.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
launch=$root/${VENV:-.venv}/bin/enginehouse-launch
if [[ ! -x $launch ]]; then
  launch=$(command -v enginehouse-launch) || {
    echo "launch.sh: enginehouse-launch is not installed; run make install" >&2
    exit 2
  }
fi
exec "$launch" --config "$root/configs/gunicorn.conf.py" "$@"

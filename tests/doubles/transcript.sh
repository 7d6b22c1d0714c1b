#!/usr/bin/env bash
# The whole path against the double, as a transcript: a random checkpoint is built for four ranks in
# FP8, served by gunicorn, asked, streamed, cancelled, bound to a schema, and counted.
# Usage, from the checkout: tests/doubles/transcript.sh [FOLDER]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
bin=$root/${VENV:-.venv}/bin
folder=${1:-$(mktemp -d)}
port=${PORT:-8123}
url=http://127.0.0.1:$port
export PATH=$root/tests/doubles/bin:$bin:$PATH PYTHONPATH=$root/tests/doubles
export DOUBLE_PYTHON=$bin/python OMP_NUM_THREADS=1 COLUMNS=100

show() {
  echo
  echo "\$ $*"
  "$@"
}
ask() { # a path, a body, more of curl's flags
  show curl -sS "$url$1" -H 'Content-Type: application/json' "${@:3}" -d "$2"
  echo
}
count() { curl -sS "$url/metrics" | grep -E "^enginehouse_($1) " || true; }

"$bin/python" scripts/tiny_checkpoint.py "$folder/tiny"
show enginehouse-build "$folder/tiny" -o "$folder/engine" --backend tensorrt_llm --tp 4 --quant fp8 \
  --kv-cache-dtype fp8 --max-batch-size 8
show ls "$folder/engine"
show enginehouse-launch "$folder/engine" --dry-run
ENGINEHOUSE_BIND=127.0.0.1:$port enginehouse-launch "$folder/engine" >"$folder/server.log" 2>&1 &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
for _ in $(seq 240); do
  curl -sf "$url/health/ready" >/dev/null && break
  kill -0 $server
  sleep 0.5
done
grep -v '^\[' "$folder/server.log"

question='"model": "tiny", "messages": [{"role": "user", "content": "What is the time?"}]'
ask /v1/chat/completions "{$question, \"temperature\": 0, \"max_tokens\": 12}"
ask /v1/chat/completions "{$question, \"temperature\": 0, \"max_tokens\": 4, \"stream\": true}" -N
ask /v1/chat/completions "{$question, \"max_tokens\": 60, \"temperature\": 0, \"response_format\":
  {\"type\": \"json_schema\", \"json_schema\": {\"name\": \"ok\", \"strict\": true, \"schema\":
  {\"type\": \"object\", \"properties\": {\"ok\": {\"type\": \"boolean\"}}, \"required\": [\"ok\"],
  \"additionalProperties\": false}}}}"

echo
echo "A stream of 1,500 tokens whose client goes away after 0.5 s:"
curl -sSN -m 0.5 "$url/v1/chat/completions" -H 'Content-Type: application/json' \
  -d "{$question, \"max_tokens\": 1500, \"ignore_eos\": true, \"stream\": true}" >"$folder/cut" \
  2>&1 || true
echo "$(grep -c '^data' "$folder/cut") events arrived; then the engine:"
for _ in $(seq 60); do
  count num_requests_running | grep -q ' 0\(\.0\)\?$' && break
  sleep 0.25
done
sleep 1.5 # statistics arrive once a second
count 'num_requests_running|engine_generation_tokens_total|iterations_total|kv_cache_blocks.*'
ranks=$(pgrep -P "$(pgrep -P $server -f enginehouse-host)" -f RANK)
kill -TERM $server
wait $server && echo "SIGTERM: the server ended with status 0"
trap - EXIT
for rank in $ranks; do
  ! kill -0 "$rank" 2>/dev/null || { echo "rank process $rank is left" && exit 1; }
done
echo "none of the $(wc -w <<<"$ranks") rank processes is left"

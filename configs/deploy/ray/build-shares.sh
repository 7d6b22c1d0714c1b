#!/usr/bin/env bash
# A conversion on the nodes of a Ray cluster that see one folder: a job for each share, then one that joins them.
# `ray job` is of ray[default].
#
#   export RAY_ADDRESS=http://head:8265 MODEL=/models/llama-405b OUTPUT=/engines/llama-405b SHARES=16
#   BUILD="--quant fp8_rowwise --tp 8" ./build-shares.sh
#
# A share that failed is started again by the same command: those that are done are skipped over.
set -euo pipefail
: "${MODEL:?a checkpoint or a hub id}" "${OUTPUT:?the folder of the engine}" "${SHARES:?how many jobs}"
read -ra settings <<< "${BUILD:-}"
jobs=()
for share in $(seq "$SHARES"); do
  ray job submit --entrypoint-num-cpus "${CPUS:-4}" -- \
    enginehouse build "$MODEL" -o "$OUTPUT" "${settings[@]}" --shard "$share/$SHARES" &
  jobs+=($!)
done
for job in "${jobs[@]}"; do
  wait "$job"
done
ray job submit --entrypoint-num-cpus "${CPUS:-4}" -- \
  enginehouse build "$MODEL" -o "$OUTPUT" "${settings[@]}" --join

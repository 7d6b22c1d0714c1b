#!/usr/bin/env bash
# A conversion on many machines that see one folder, and one job behind it that joins the shares:
#
#   export MODEL=/models/llama-405b OUTPUT=/engines/llama-405b BUILD="--quant fp8_rowwise --tp 8"
#   shares=$(sbatch --parsable --array=1-16 build-shares.sh)
#   sbatch --dependency=afterok:"$shares" build-shares.sh
#
# MODEL, OUTPUT and BUILD are the same for all of them. A share that was stopped is submitted again
# as it was (`sbatch --array=7 --export=ALL,SHARES=16 build-shares.sh`), and goes on.
#SBATCH --job-name=enginehouse-build
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
set -euo pipefail
: "${MODEL:?a checkpoint or a hub id}" "${OUTPUT:?the folder of the engine}"
read -ra settings <<< "${BUILD:-}"
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  part=(--shard "$SLURM_ARRAY_TASK_ID/${SHARES:-$SLURM_ARRAY_TASK_COUNT}")
else
  part=(--join)
fi
exec enginehouse build "$MODEL" -o "$OUTPUT" "${settings[@]}" "${part[@]}"

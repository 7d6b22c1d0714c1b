#!/usr/bin/env bash
# An engine of TensorRT plans over several nodes: a task for each rank, of which the first is the server.
#
#   export ENGINE=/engines/mine KEY=$HOME/ranks.key      # seen by all nodes; openssl rand -hex 32 > $KEY
#   sbatch --nodes 2 --ntasks-per-node 4 --gpus-per-node 4 serve-ranks.sh
#
# As many tasks as the engine has ranks. A rank that is lost ends the engine; the server starts it
# again, and each task comes back to it. What goes between the nodes is for a network of their own.
#SBATCH --job-name=enginehouse-serve
set -euo pipefail
: "${ENGINE:?the folder of the engine}" "${KEY:?the file of the secret that ranks prove to have}"
if [[ -z ${SLURM_PROCID:-} || ${SLURM_STEP_ID:-batch} == batch ]]; then
  export LEADER="${SLURMD_NODENAME:-$(hostname)}"  # the batch script's node is the first task's
  exec srun --kill-on-bad-exit=0 "$0"
fi
if [[ $SLURM_PROCID == 0 ]]; then
  export ENGINEHOUSE_RANKS_ADDRESS="0.0.0.0:${RANKS_PORT:-5600}" ENGINEHOUSE_RANKS_KEY_FILE="$KEY"
  exec enginehouse serve "$ENGINE" --host 0.0.0.0 --port "${PORT:-8000}"
fi
export CUDA_VISIBLE_DEVICES="${SLURM_LOCALID:-0}"
while true; do
  enginehouse-rank "$ENGINE" --rank "$SLURM_PROCID" --leader "$LEADER:${RANKS_PORT:-5600}" \
    --key-file "$KEY" || sleep 5
done

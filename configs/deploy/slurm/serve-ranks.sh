#!/usr/bin/env bash
# An engine of TensorRT plans over several nodes: a task for each, of which the first is the server.
#
#   export ENGINE=/engines/mine KEY=$HOME/ranks.key      # seen by all nodes; openssl rand -hex 32 > $KEY
#   sbatch --nodes 2 --gpus-per-node 4 --cpus-per-task 32 serve-ranks.sh
#
# As many GPUs as the engine has ranks. A rank that is lost ends the engine; the server starts it
# again, and each rank comes back to it. A node whose ranks refuse says why, and ends the job. What
# goes between the nodes is for a network of their own.
#SBATCH --job-name=enginehouse-serve
#SBATCH --ntasks-per-node=1
set -euo pipefail
: "${ENGINE:?the folder of the engine}" "${KEY:?the file of the secret that ranks prove to have}"
if ! command -v enginehouse-launch > /dev/null; then
  echo "serve-ranks.sh: enginehouse-launch is not on PATH on $(hostname); activate the environment" \
    "that enginehouse is installed in before sbatch" >&2
  exit 127
fi
if [[ -z ${SLURM_PROCID:-} || ${SLURM_STEP_ID:-batch} == batch ]]; then
  export LEADER="${SLURMD_NODENAME:-$(hostname)}"  # the batch script's node is the first task's
  cpus=${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}  # srun does not inherit them
  exec srun ${cpus:+"$cpus"} --kill-on-bad-exit=1 --wait=60 "$0"
fi
if [[ $SLURM_NTASKS != "$SLURM_NNODES" ]]; then
  echo "serve-ranks.sh: $SLURM_NTASKS tasks on $SLURM_NNODES nodes; wanted one on each, which starts" \
    "a rank for each of its GPUs: leave --ntasks-per-node out" >&2
  exit 2
fi
export ENGINEHOUSE_RANKS_ADDRESS="0.0.0.0:${RANKS_PORT:-5600}"
if [[ $SLURM_PROCID == 0 ]]; then
  export ENGINEHOUSE_BIND="0.0.0.0:${PORT:-8000}"
  exec enginehouse-launch "$ENGINE" --nodes "$SLURM_NTASKS" --ranks-key "$KEY"
fi
exec enginehouse-launch "$ENGINE" --nodes "$SLURM_NTASKS" --ranks-key "$KEY" \
  --worker --node "$SLURM_PROCID" --leader "$LEADER"

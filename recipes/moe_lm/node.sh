#!/usr/bin/env bash
# Starts this node's ranks; slurm.sbatch runs it on every node and sets the variables it reads.
#   usage: node.sh [train.py's options]
# SIGUSR1 is passed on to the ranks, which save a checkpoint and end with exit code 0.
set -euo pipefail

trap '' USR1 # inherited by torchrun, which knows nothing of this signal and would die of it
"$PYTHON" -m torch.distributed.run \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$GPUS_PER_NODE" --max-restarts 0 \
  --rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" --rdzv-id "$SLURM_JOB_ID" \
  --rdzv-conf "is_host=$((SLURM_NODEID == 0))" \
  recipes/moe_lm/train.py "$@" &
torchrun=$!
trap 'pkill -USR1 -P "$torchrun" || true' USR1

# A signal ends `wait` but not torchrun; only the last one reads its exit code.
while kill -0 "$torchrun" 2>/dev/null; do
  sleep 1 &
  wait $! || true
done
wait "$torchrun"

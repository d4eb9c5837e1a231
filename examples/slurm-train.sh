#!/usr/bin/env bash
# Train one stage on several machines of a Slurm cluster: one launcher per machine, one rank per GPU.
#
#   sbatch --nodes 2 examples/slurm-train.sh yamls/stage2.yaml init_from=runs/stage1
#
# All machines must see the same data (or stores) and the same save.folder. The same command continues from the last
# checkpoint, on any number of machines.
#SBATCH --job-name train
#SBATCH --ntasks-per-node 1
#SBATCH --gres gpu:8
#SBATCH --cpus-per-task 64
#SBATCH --time 48:00:00
#SBATCH --requeue
#SBATCH --output train-%j.log
set -euo pipefail

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Packs have images now and then: without it, the allocator's blocks of many sizes leave gaps that fit nothing.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export MASTER_ADDR=${hosts%%$'\n'*} MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# Each launcher learns its number from Slurm. If one fails, the job ends; otherwise the others would wait for it.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c 'exec .venv/bin/composer -n "$SLURM_GPUS_ON_NODE" \
    --world_size "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" --node_rank "$SLURM_NODEID" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" train.py "$@"' composer "$@"

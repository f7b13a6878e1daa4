#!/usr/bin/env bash
#SBATCH --job-name=raptor_blocks
#SBATCH --output=logs/%x_%A_%a.out
#SBATCH --array=0-2
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=120G
#SBATCH --time=3-00:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#
#   mkdir -p logs && sbatch training/slurm/imagenet_blocks.sh [--flag value …]
#
# Stage 1 as a job array, a task a seed; each makes the blocks of k = 2, 3 and 4. A job that is
# pre-empted, or whose time is up, goes back into the queue and on from its checkpoint.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
seeds=(100 106 112)
seed=${seeds[${SLURM_ARRAY_TASK_ID:-0}]}
exec bash training/slurm/launch.sh training/pretrain_blocks.py training/recipes/imagenet_blocks.yaml \
  --resume --seed "$seed" --output_dir "outputs/imagenet/seed_$seed/blocks" "$@"

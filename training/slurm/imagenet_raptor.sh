#!/usr/bin/env bash
#SBATCH --job-name=raptor_raptor
#SBATCH --output=logs/%x_%A_%a.out
#SBATCH --array=0-8
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=120G
#SBATCH --time=3-00:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#
#   mkdir -p logs && sbatch training/slurm/imagenet_raptor.sh [--flag value …]
#
# Stage 2 as a job array, a task for each of k = 2, 3, 4 and three seeds. After the blocks:
#   sbatch --dependency=afterok:<job of imagenet_blocks.sh> training/slurm/imagenet_raptor.sh
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
task=${SLURM_ARRAY_TASK_ID:-0}
k=$((2 + task / 3))
number=$((task % 3))
blocks=(100 106 112)
phases=("7 5" "7 3 2" "4 3 3 2")
seed=$((1001 + 100 * (k - 2) + number))
exec bash training/slurm/launch.sh training/distill_raptor.py training/recipes/imagenet_raptor.yaml \
  --phases ${phases[k - 2]} --resume --seed "$seed" --blocks "outputs/imagenet/seed_${blocks[number]}/blocks" \
  --output_dir "outputs/imagenet/raptor_k${k}_seed_$seed" "$@"

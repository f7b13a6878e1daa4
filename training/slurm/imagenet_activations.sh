#!/usr/bin/env bash
#SBATCH --job-name=raptor_activations
#SBATCH --output=logs/%x_%A_%a.out
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --mem=120G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#
#   mkdir -p logs && sbatch training/slurm/imagenet_activations.sh [--flag value …]
#
# The activations of ImageNet-1k (6.68 TB), once for all seeds. With --nodes=4 four nodes share the shards.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
exec bash training/slurm/launch.sh training/extract_activations.py training/recipes/imagenet_activations.yaml \
  --resume "$@"

#!/usr/bin/env bash
# accelerate launch on what SLURM gave the job: a process a GPU, on one node or several.
#
#   bash training/slurm/launch.sh training/distill_raptor.py RECIPE [--flag value …]
set -euo pipefail
[ ! -d .venv ] || source .venv/bin/activate
nodes=${SLURM_NNODES:-1}
gpus=${SLURM_GPUS_ON_NODE:-1}
port=$((20000 + ${SLURM_JOB_ID:-0} % 20000))  # jobs that share a node must not share a port

if [ "$nodes" = 1 ]; then
  several=()
  [ "$gpus" = 1 ] || several=(--multi_gpu --main_process_port "$port")
  exec accelerate launch "${several[@]}" --num_machines 1 --num_processes "$gpus" "$@"
fi

export HEAD_NODE GPUS=$gpus PORT=$port
read -r HEAD_NODE < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# one launcher a node, which starts a process a GPU; SLURM_NODEID is known on the node only
srun --nodes="$nodes" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
  exec accelerate launch --multi_gpu --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
    --num_processes $((SLURM_NNODES * GPUS)) --main_process_ip "$HEAD_NODE" --main_process_port "$PORT" \
    --rdzv_backend c10d "$@"' launch "$@"

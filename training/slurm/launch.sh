#!/usr/bin/env bash
# accelerate launch on what SLURM gave the job: a process a GPU, on one node or several.
#
#   exec bash training/slurm/launch.sh training/distill_raptor.py RECIPE [--flag value …]
#
# For jobs with `#SBATCH --requeue` and `#SBATCH --signal=B:USR1@300`: five minutes before the time is up the
# processes save a checkpoint and leave, and the job goes back into the queue, where --resume goes on. The same
# when the job is pre-empted: its processes get SIGTERM, and SLURM itself requeues it.
set -euo pipefail
[ ! -d .venv ] || source .venv/bin/activate
export NODES=${SLURM_NNODES:-1} GPUS=${SLURM_GPUS_ON_NODE:-1} HEAD_NODE=
export PORT=$((20000 + ${SLURM_JOB_ID:-0} % 20000))  # jobs that share a node must not share a port
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240  # seconds that torchrun's processes have for a checkpoint
[ "$NODES" = 1 ] || read -r HEAD_NODE < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# one launcher a node, which starts a process a GPU; SLURM_NODEID is known on the node only
srun --nodes="$NODES" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
  trap "" TERM  # a launcher of one process must outlive it: SLURM ends a task with its first process
  several=(--num_machines 1)
  [ "$GPUS" = 1 ] || several=(--multi_gpu --main_process_port "$PORT" --num_machines 1)
  [ "$NODES" = 1 ] || several=(--multi_gpu --num_machines "$NODES" --machine_rank "$SLURM_NODEID"
    --main_process_ip "$HEAD_NODE" --main_process_port "$PORT" --rdzv_backend c10d)
  exec accelerate launch "${several[@]}" --num_processes $((NODES * GPUS)) "$@"' launch "$@" &
step=$!

requeue() {
  trap "" USR1
  kill -TERM "$step"  # srun passes it on to every process
  wait "$step" && exit 0 || echo "The step ended with code $?: back into the queue."
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
trap requeue USR1
wait "$step"

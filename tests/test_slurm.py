"""The job scripts of `training/slurm`, with SLURM's own commands replaced."""

import os
import re
import signal
import stat
import subprocess
import time

import pytest

from raptor_hf.data import make_processor
from raptor_hf.loop.checkpoints import checkpoints_of
from raptor_hf.runs.files import read_json
from tests.helpers import tiny_teacher
from tests.programs import ENVIRONMENT, ROOT, run


def stub(folder, name, body):
    """A command of a cluster, replaced."""
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def job_environment(stubs, **variables):
    return {**ENVIRONMENT, "PATH": f"{stubs}:{os.environ['PATH']}", **variables}


def run_slurm(script, stubs, *flags, **variables):
    # a copy without .venv, where launch.sh would look for accelerate first
    done = subprocess.run(
        ["bash", f"training/slurm/{script}", *flags],
        cwd=stubs.parent, env=job_environment(stubs, **variables), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def stubs(tmp_path):
    (tmp_path / "training").symlink_to(ROOT / "training")
    folder = tmp_path / "bin"
    folder.mkdir()
    stub(folder, "accelerate", 'echo "node ${SLURM_NODEID:-}: accelerate $*"')
    stub(folder, "scontrol", "echo first\necho second")
    nodes = 'for SLURM_NODEID in $(seq 0 $((NODES - 1))); do export SLURM_NODEID; "$@" & wait; done'
    stub(folder, "srun", f"shift 3; {nodes}")
    return folder


def test_job_arrays_cover_every_k_and_seed(stubs):
    seen = set()
    for task in range(9):
        (line,) = run_slurm("imagenet_raptor.sh", stubs, SLURM_ARRAY_TASK_ID=str(task))
        phases, seed, block_seed = re.search(
            r"imagenet_raptor.yaml --phases ([\d ]+) --resume --seed (\d+) --blocks \S*seed_(\d+)/",
            line,
        ).groups()
        assert sum(map(int, phases.split())) == 12
        seen.add((len(phases.split()), int(seed), int(block_seed)))
    assert seen == {(k, 1001 + 100 * (k - 2) + i, 100 + 6 * i) for k in (2, 3, 4) for i in range(3)}
    for task, seed in enumerate((100, 106, 112)):
        (line,) = run_slurm("imagenet_blocks.sh", stubs, SLURM_ARRAY_TASK_ID=str(task))
        assert f"--seed {seed} --output_dir outputs/imagenet/seed_{seed}/blocks" in line


def test_one_node_and_several_nodes_are_launched(stubs):
    (line,) = run_slurm("imagenet_activations.sh", stubs, "--dry_run", SLURM_GPUS_ON_NODE="4")
    start = "accelerate launch --multi_gpu --main_process_port 20000 --num_machines 1 "
    assert f"{start}--num_processes 4 training/extract_activations.py" in line
    assert line.endswith("--resume --dry_run")
    lines = run_slurm(
        "imagenet_blocks.sh", stubs,
        SLURM_NNODES="2", SLURM_GPUS_ON_NODE="4", SLURM_JOB_NODELIST="n[1-2]",
        SLURM_JOB_ID="40077",
    )  # fmt: skip
    assert [line.split(":")[0] for line in lines] == ["node 0", "node 1"]
    for rank, line in enumerate(lines):
        assert f"--multi_gpu --num_machines 2 --machine_rank {rank} " in line
        assert "--main_process_ip first --main_process_port 20077" in line
        assert "--rdzv_backend c10d --num_processes 8 training/pretrain_blocks.py" in line


def test_every_job_asks_to_be_requeued_and_to_be_told_in_time():
    for name in ("activations", "blocks", "raptor"):
        script = (ROOT / "training" / "slurm" / f"imagenet_{name}.sh").read_text()
        assert "#SBATCH --requeue\n#SBATCH --signal=B:USR1@300\n" in script
        # with exec the signal arrives where it is trapped
        assert "\nexec bash training/slurm/launch.sh" in script and "--resume" in script


@pytest.mark.slow
def test_a_job_that_is_told_to_stop_saves_requeues_and_goes_on(tmp_path):
    """The real accelerate and the real program, as SLURM would start and signal them."""
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    make_processor(8).save_pretrained(tmp_path / "teacher")
    folder = tmp_path / "bin"
    folder.mkdir()
    stub(folder, "scontrol", f'echo "$*" >> {tmp_path / "scontrol.log"}')
    # srun passes signals on to the processes of its tasks, as this does
    passed_on = 'trap "kill -TERM -- -$!" TERM'
    stub(folder, "srun", f'shift 3; set -m; "$@" & {passed_on}; wait $! || wait $!')
    out = tmp_path / "run"
    job = [
        "bash", "training/slurm/launch.sh", "training/pretrain_blocks.py", "--resume",
        "--output_dir", str(out), "--teacher", str(tmp_path / "teacher"),
        "--activations", "online", "--dataset", "digits", "--spans", "0-6", "--steps", "300",
        "--batch_size", "32", "--warmup_steps", "1", "--report_to", "none",
        "--checkpoint_every", "1000000", "--log_every", "1",
    ]  # fmt: skip
    environment = job_environment(folder, SLURM_JOB_ID="77")
    process = subprocess.Popen(
        job, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    log = out / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 2):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "Stopped by SIGTERM" in printed, printed
    assert "back into the queue" in printed
    assert (tmp_path / "scontrol.log").read_text() == "requeue 77\n"
    assert len(list(checkpoints_of(out).glob("step_*"))) == 1
    done = run(*job, **environment)  # what SLURM does next
    assert "going on after step" in done.stdout
    assert read_json(out / "run.json")["finished"]
    assert len(log.read_text().splitlines()) == 300

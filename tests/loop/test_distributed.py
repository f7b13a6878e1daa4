"""Several processes: they learn what one learns, also on two machines, in parts, after a change of
their number.
"""

import json
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from raptor_hf.activations.store import load_activations
from raptor_hf.activations.writing import write_activations
from raptor_hf.data import ImageViews, load_images, make_processor
from tests.helpers import tiny_teacher
from tests.programs import ACCELERATE_LAUNCH, TORCHRUN, TWO_PROCESSES, free_port, run, start

# as torchrun sets it for several processes: sums in the same order
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
SIX = ["--spans", "0-3", "3-6", "--init", "random", "--report_to", "none", "--log_every", "1"]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """The command that trains two blocks for ten steps, without its output folder."""
    folder = tmp_path_factory.mktemp("source")
    teacher = tiny_teacher()
    teacher.save_pretrained(folder / "teacher")
    make_processor(8).save_pretrained(folder / "teacher")
    images = ImageViews(load_images("digits", "test").select(range(40)), make_processor(8))
    (folder / "activations").mkdir()
    write_activations(teacher, images, folder / "activations", dtype="float32")
    command = ["training/pretrain_blocks.py", "--teacher", folder / "teacher", *SIX]
    command += ["--activations", folder / "activations", "--steps", "10", "--batch_size", "9"]
    command += ["--learning_rate", "3e-3", "--warmup_steps", "2", "--checkpoint_every", "4"]
    # 13 images do not divide by two processes
    command += ["--validation_dataset", "digits", "--validation_images", "13"]
    # and the variances of the states are measured by both
    return [*command, "--validate_every", "5", "--normalize", "group"]


@pytest.fixture(scope="module")
def one_process(blocks, tmp_path_factory):
    """The folder of a run on one process."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    done = run(sys.executable, *blocks, "--output_dir", folder, **ONE_THREAD)
    assert "1 process on cpu\n" in done.stderr
    assert "one: 9 images a step, in 1 processes of 1 parts\n" in done.stdout
    return folder


def log_of(folder):
    """The lines of a log without what depends on the clock."""
    clock = ("seconds", "images_per_second")
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def assert_same(folder, expected, tolerance=2e-5):
    """The same log and the same blocks, to rounding."""
    logs = log_of(folder), log_of(expected)
    assert len(logs[0]) == 12  # ten steps, two validations
    assert any("3-6/r2" in line for line in logs[0])
    for found, line in zip(*logs, strict=True):
        assert found == pytest.approx(line, rel=tolerance, abs=1e-7)
    weights = [load_file(path / "blocks.safetensors") for path in (folder, expected)]
    for name, weight in weights[1].items():
        torch.testing.assert_close(weights[0][name], weight, rtol=1e-3, atol=1e-5)


def test_two_processes_learn_what_one_learns(blocks, one_process, tmp_path):
    done = run(*TWO_PROCESSES, *blocks, "--output_dir", tmp_path / "two")
    assert "2 processes on cpu\n" in done.stderr
    # a share of five and one of four: each image counts the same
    assert "in 2 processes of 1 parts\n" in done.stdout
    assert_same(tmp_path / "two", one_process)


GRADIENTS = """
import sys
import torch
from accelerate.optimizer import AcceleratedOptimizer
from raptor_hf.loop import fit
from raptor_hf.runs.processes import process_state
from tests.helpers import FeatureDataset, arguments, compute_loss

torch.manual_seed(0)
features = torch.randn(37, 5)
network = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.GELU(), torch.nn.Linear(16, 2))
output, step = f"{sys.argv[1]}/{process_state().num_processes}", AcceleratedOptimizer.step

def save_and_step(optimizer):
    if process_state().is_main_process:
        gradients = {name: weight.grad for name, weight in network.named_parameters()}
        torch.save(gradients, f"{output}.pt")
    step(optimizer)

AcceleratedOptimizer.step = save_and_step
dataset = FeatureDataset(features, (features.sum(1) > 0).long())
changes = {"steps": 1, "batch_size": 13, "per_device_batch_size": 4}
fit(network, dataset, compute_loss, arguments(output, **changes))
"""


def test_gradients_of_two_processes_are_those_of_one(tmp_path):
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    run(sys.executable, script, tmp_path)
    run(*TWO_PROCESSES, script, tmp_path)
    one, two = (torch.load(tmp_path / f"{number}.pt") for number in (1, 2))
    assert len(one) == 4
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-5, atol=1e-8)
        assert gradient.abs().max() > 1e-3


def test_parts_that_are_accumulated_are_a_whole_batch(blocks, one_process, tmp_path):
    done = run(*TWO_PROCESSES, *blocks, "--per_device_batch_size", "2",
               "--gradient_checkpointing", "True", "--output_dir", tmp_path / "parts")  # fmt: skip
    assert "in 2 processes of 3 parts\n" in done.stdout
    assert_same(tmp_path / "parts", one_process)


@pytest.mark.slow
def test_two_machines_learn_what_one_learns(blocks, one_process, tmp_path):
    launch = [*TORCHRUN, "--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1"]
    launch += ["--master_port", free_port()]
    machines = [
        start(*launch, "--node_rank", rank, *blocks, "--output_dir", tmp_path / "run", **ONE_THREAD)
        for rank in (0, 1)
    ]
    printed = [machine.communicate(timeout=300) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], printed
    assert "2 processes on cpu\n" in printed[0][1]
    assert_same(tmp_path / "run", one_process)


def test_one_process_goes_on_with_what_two_began(blocks, one_process, tmp_path):
    folder = tmp_path / "run"
    cut = ["--output_dir", folder, "--checkpoint_every", "1"]
    process = start(*TWO_PROCESSES, *blocks, *cut)
    # wait until there is something to go on with, then end it as a scheduler does
    while not list(folder.glob("checkpoints/step_*")) and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    if "Stopped by SIGTERM" in errors:  # else it had just finished
        assert "Resume with: … training/pretrain_blocks.py" in errors
        assert errors.rstrip().endswith("--resume") or "--resume\n" in errors
    done = run(sys.executable, *blocks, "--output_dir", folder, "--resume", **ONE_THREAD)
    assert "going on after step" in done.stdout
    assert_same(folder, one_process)


@pytest.mark.slow
def test_bfloat16_and_compiled_blocks_follow_float32(blocks, one_process, tmp_path):
    launch = [*ACCELERATE_LAUNCH, "--cpu", "--mixed_precision", "bf16"]
    launch += ["--dynamo_backend", "aot_eager"]  # inductor's front half, which compiles fast
    done = run(*launch, *blocks, "--output_dir", tmp_path / "run", TORCH_LOGS="graph_code")
    assert "1 process on cpu, bf16\n" in done.stderr
    # one graph serves several layers: of each block fewer were compiled than it has applications
    assert 0 < done.stderr.count("__compiled_fn") <= 8
    found, expected = (
        [line["loss"] for line in log_of(folder) if "loss" in line]
        for folder in (tmp_path / "run", one_process)
    )
    assert found == pytest.approx(expected, rel=0.02) and found != expected


def test_phases_are_the_same_from_two_processes(blocks, tmp_path):
    source = blocks[blocks.index("--activations") + 1]
    assert len(load_activations(source)) == 40
    command = ["training/find_phases.py", "--activations", source, "--k", "2", "--batch_size", "7"]
    one = run(sys.executable, *command, "--output_dir", tmp_path / "one").stdout
    two = run(*TWO_PROCESSES, *command, "--output_dir", tmp_path / "two").stdout
    assert [line for line in two.splitlines() if line.startswith("k=")] == one.splitlines()
    found, expected = (
        json.loads((tmp_path / name / "phases.json").read_text()) for name in ("two", "one")
    )
    distances = [np.array(content.pop("distance")) for content in (found, expected)]
    np.testing.assert_allclose(*distances, rtol=0, atol=2e-6)  # they are written to six digits
    assert found == expected


def test_a_program_for_one_process_refuses_two(tmp_path):
    command = ["evaluation/report.py", "--results", "evaluation/results/digits"]
    done = run(*TWO_PROCESSES, *command, "--output_dir", tmp_path / "report", check=False)
    assert done.returncode != 0 and "works on one process; 2 were started" in done.stderr

"""How programs start and stop: what they say of their processes, and with which codes they end."""

import json
import re
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

from raptor_hf.data import make_processor
from raptor_hf.runs.processes import (
    STOP_SIGNALS,
    Interrupted,
    StopSignals,
    describe_processes,
    launcher_warnings,
    run_program,
)
from tests.helpers import tiny_teacher
from tests.programs import run, start


def state(number=1, device="cpu"):
    return SimpleNamespace(num_processes=number, device=torch.device(device))


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "MASTER_PORT", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("ACCELERATE_MIXED_PRECISION", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_processes_are_described(monkeypatch):
    assert describe_processes(state()) == "1 process on cpu"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert describe_processes(state(8, "cuda")) == "8 processes on 2 machines, cuda, bf16"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "4"}, r"\(WORLD_SIZE\) asked for 4 processes"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "srun asked for 2 processes"),
        ({"MASTER_PORT": "1", "ACCELERATE_MIXED_PRECISION": "no"}, "started one"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "fp16 was asked for and needs a GPU"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP was asked for and needs a GPU"),
    ],
)
def test_what_was_asked_for_in_vain_is_said(monkeypatch, variables, message):
    assert launcher_warnings(state()) == []
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (wish,) = launcher_warnings(state())
    assert re.search(message, wish)
    assert launcher_warnings(state(4, "cuda")) == []


def test_a_stop_signal_is_noted_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        assert signals.received is None
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGTERM  # the first one
    assert signal.getsignal(signal.SIGTERM) is before


def stopped():
    signal.raise_signal(signal.SIGTERM)


def stopped_inside_a_library():
    """Arrow compares types by functions of Python, and makes its own error of theirs."""
    try:
        signal.raise_signal(signal.SIGTERM)
    except Interrupted:
        raise ValueError("types differ") from None


@pytest.mark.parametrize("main", [stopped, stopped_inside_a_library])
def test_a_program_that_is_told_to_stop_says_how_to_go_on(main, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["training/some.py", "--name", "two words"])
    # it ignores all of them from then on, and so would what later tests start
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        with pytest.raises(SystemExit) as stop:
            run_program(main)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert stop.value.code == 128 + signal.SIGTERM
    printed = capsys.readouterr().err
    assert "Stopped by SIGTERM." in printed
    assert "Resume with: python training/some.py --name 'two words' --resume" in printed


def test_help_says_nothing_of_processes():
    printed = run(sys.executable, "training/pretrain_blocks.py", "--help")
    assert "per_device_batch_size" in printed.stdout and "process on" not in printed.stderr


def test_an_extraction_that_is_told_to_stop_says_how_to_go_on(tmp_path):
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    make_processor(8).save_pretrained(tmp_path / "teacher")
    command = ["training/extract_activations.py", "--teacher", tmp_path / "teacher", "--views", "9"]
    command += ["--batch_size", "2", "--shard_megabytes", "0", "--output_dir", tmp_path / "store"]
    process = start(sys.executable, *command)
    while not list(tmp_path.glob("store/data-*.arrow")) and process.poll() is None:
        pass
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Stopped by SIGTERM. What was finished is kept. Resume with: python" in errors
    assert list(tmp_path.glob("store/data-*.arrow")) and not list(tmp_path.glob("store/*.tmp"))
    assert json.loads((tmp_path / "store" / "run.json").read_text())["finished"] is False


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.slow
def test_a_machine_that_knows_ascii_alone_writes_utf_8(store, tmp_path):
    """What it prints may lack a letter; its files lack none, and nothing ends a run."""
    said = run(sys.executable, "-c", "import locale; print(locale.getencoding())", **ASCII)
    assert said.stdout.strip() in ("ANSI_X3.4-1968", "US-ASCII", "646")
    folder = tmp_path / "fünf_γ"
    command = ["-m", "evaluation.dynamics", "--data", store, "--output_dir", folder]
    command += ["--analyses", "class_basins", "phase_contrast", "--random_partitions", "5"]
    done = run(sys.executable, *command, **ASCII)
    assert "dynamics.json" in done.stdout
    assert "γ" in (folder / "what_we_see.md").read_text(encoding="utf-8")
    shown = run(sys.executable, "evaluation/probe.py", "--help", **ASCII)
    assert "NAME=FOLDER" in shown.stdout

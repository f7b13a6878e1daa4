"""How programs start and stop: their processes, signals, errors and exit codes."""

import json
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from raptor_hf.data import make_processor
from raptor_hf.runs.processes import (
    STOP_SIGNALS,
    Interrupted,
    StopSignals,
    describe_processes,
    run_program,
)
from tests.helpers import tiny_teacher
from tests.programs import TWO_PROCESSES, run, start


def test_processes_are_described(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    one = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    assert describe_processes(one) == "1 process on cpu"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    eight = SimpleNamespace(num_processes=8, device=torch.device("cuda"))
    assert describe_processes(eight) == "8 processes on cuda, bf16"


def test_two_processes_on_the_cpu_know_of_each_other(tmp_path):
    script = tmp_path / "count.py"
    script.write_text(
        "from pathlib import Path\n"
        "from raptor_hf.runs.processes import process_state\n"
        "state = process_state()\n"
        "said = f'{state.process_index} of {state.num_processes}'\n"
        "Path(__file__).with_name(said).touch()\n"  # what two processes print may run together
    )
    run(*TWO_PROCESSES, script, ACCELERATE_USE_CPU="true")
    assert sorted(file.name for file in tmp_path.glob("* of *")) == ["0 of 2", "1 of 2"]


def test_a_stop_signal_is_noted_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        assert signals.received is None
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGTERM  # the first one
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_is_ignored_stays_ignored(handlers):
    """As `nohup` starts a program."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGHUP)
        assert signals.received is None
        signal.raise_signal(signal.SIGUSR2)
        assert signals.received == signal.SIGUSR2
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.fixture
def handlers():
    """Put the handlers of stop signals back: `run_program` sets them for the whole process."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def stopped():
    signal.raise_signal(signal.SIGTERM)


def stopped_inside_a_library():
    """Arrow compares types by functions of Python, and makes its own error of theirs."""
    try:
        signal.raise_signal(signal.SIGTERM)
    except Interrupted:
        raise ValueError("types differ") from None


@pytest.mark.parametrize("main", [stopped, stopped_inside_a_library])
def test_a_stopped_program_says_how_to_go_on(main, handlers, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["training/some.py", "--name", "two words"])
    with pytest.raises(SystemExit) as stop:
        run_program(main)
    assert stop.value.code == 128 + signal.SIGTERM
    printed = capsys.readouterr().err
    assert "Stopped by SIGTERM." in printed
    assert "Resume with: python training/some.py --name 'two words' --resume" in printed


def wrong_file():
    Path("/no/such/file").read_text()


def wrong_argument():
    from raptor_hf.distillation.arguments import parse_token_weights

    parse_token_weights("7")


def damaged_weights():
    safetensors.torch.load(b"cut off")


@pytest.mark.parametrize("main", [wrong_file, wrong_argument, damaged_weights])
def test_an_error_of_the_user_is_one_line(main, handlers, capsys):
    with pytest.raises(SystemExit) as stop:
        run_program(main)
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")


def not_equally_long():
    from raptor_hf.runs.processes import describe_processes

    return describe_processes, list(zip([1], [1, 2], strict=True))


def not_a_number():
    torch.zeros(2).reshape(3)


@pytest.mark.parametrize("main", [not_equally_long, not_a_number])
def test_a_bug_keeps_its_traceback(main, handlers):
    with pytest.raises((ValueError, RuntimeError)):
        run_program(main)


def test_a_program_with_a_wrong_folder_ends_with_exit_code_2(tmp_path):
    command = ["training/find_phases.py", "--activations", "/nowhere", "--output_dir", tmp_path]
    done = run(sys.executable, *command, check=False)
    assert done.returncode == 2
    assert "error: /nowhere" in done.stderr and "Traceback" not in done.stderr


def test_a_stopped_extraction_keeps_its_shards(tmp_path):
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    make_processor(8).save_pretrained(tmp_path / "teacher")
    command = ["training/extract_activations.py", "--teacher", tmp_path / "teacher", "--views", "9"]
    command += ["--batch_size", "2", "--shard_megabytes", "0", "--output_dir", tmp_path / "store"]
    process = start(sys.executable, *command)
    while not list(tmp_path.glob("store/data-*.arrow")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Stopped by SIGTERM. What was finished is kept. Resume with: python" in errors
    assert list(tmp_path.glob("store/data-*.arrow")) and not list(tmp_path.glob("store/*.tmp"))
    assert json.loads((tmp_path / "store" / "run.json").read_text())["finished"] is False

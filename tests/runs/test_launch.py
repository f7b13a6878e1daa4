"""How programs start and stop: their processes, signals, errors and exit codes."""

import json
import signal
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import safetensors.torch
import torch

from raptor_hf.data import ImageViews, batches, make_processor
from raptor_hf.runs.processes import (
    STOP_SIGNALS,
    Interrupted,
    noted_stop_signals,
    run_program,
)
from tests.helpers import tiny_teacher
from tests.programs import start


def test_a_stop_signal_is_noted_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with noted_stop_signals() as received:
        assert received == []
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGTERM, signal.SIGINT]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_is_ignored_stays_ignored(handlers):
    """As `nohup` starts a program."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with noted_stop_signals() as received:
        signal.raise_signal(signal.SIGHUP)
        assert received == []
        signal.raise_signal(signal.SIGUSR2)
        assert received == [signal.SIGUSR2]
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


def read_in_a_worker(path):
    rows = datasets.Dataset.from_dict({"image": [str(path)]}).cast_column("image", datasets.Image())
    for _ in batches(ImageViews(rows, make_processor(8)), 1, None, num_workers=1):
        pass


def wrong_file_in_a_worker():
    read_in_a_worker("/no/such/file.png")


def broken_image_in_a_worker():
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        read_in_a_worker(file.name)


def damaged_weights():
    safetensors.torch.load(b"cut off")


IN_A_WORKER = [wrong_file_in_a_worker, broken_image_in_a_worker]


@pytest.mark.parametrize("main", [wrong_file, wrong_argument, damaged_weights, *IN_A_WORKER])
def test_an_error_of_the_user_is_one_line(main, handlers, capsys):
    with pytest.raises(SystemExit) as stop:
        run_program(main)
    assert stop.value.code == 2
    first, last = capsys.readouterr().err.splitlines()
    assert first == "1 process on cpu" and last.startswith("error: ")
    if main in IN_A_WORKER:
        assert ".png" in last


def not_equally_long():
    list(zip([1], [1, 2], strict=True))


def not_a_number():
    torch.zeros(2).reshape(3)


class WithABug(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitems__(self, rows):
        return {"x": np.zeros(2).reshape(3)}


def bug_in_a_worker():
    list(batches(WithABug(), 1, None, num_workers=1))


@pytest.mark.parametrize("main", [not_equally_long, not_a_number, bug_in_a_worker])
def test_a_bug_keeps_its_traceback(main, handlers):
    with pytest.raises((ValueError, RuntimeError)):
        run_program(main)


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

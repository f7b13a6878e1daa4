"""A training that is killed or stopped, that runs out of disk or memory, or is refused."""

import errno
import fcntl
import os
import random
import resource
import signal
import time

import pytest
import torch
from accelerate import Accelerator

from raptor_hf.loop import fit, newest_checkpoint, read_log, remove_checkpoints
from raptor_hf.loop.checkpoints import checkpoints_of
from tests.helpers import (
    PROCESSES,
    FeatureDataset,
    arguments,
    compute_loss,
    noisy_network,
    untimed,
)

STEPS = 120


def train(path, pause=0.0, **changes):
    """A training with dropout; its result is written at its end.

    With a pause in every step it waits before its last two, until it is killed or the file `told`
    says that a signal was sent: the process that sends it may be slow.
    """

    def slow_loss(module, batch, progress):
        time.sleep(pause)
        while pause and round(progress * STEPS) >= STEPS - 2 and not (path / "told").exists():
            time.sleep(pause)
        return compute_loss(module, batch, progress)

    torch.set_num_threads(1)
    features = torch.randn(37, 5, generator=torch.Generator().manual_seed(0))
    dataset = FeatureDataset(features, (features.sum(1) > 0).long())
    changes = {"steps": STEPS, "checkpoint_every": 3, "num_workers": 0} | changes
    network = fit(noisy_network(), dataset, slow_loss, arguments(path, **changes))
    torch.save(network.state_dict(), path / "result.pt")


def start_training(path, **changes):
    process = PROCESSES.Process(target=train, args=(path,), kwargs=changes)
    process.start()
    return process


def wait_for(condition, process):
    while not condition() and process.is_alive():
        time.sleep(0.002)


def steps_of(checkpoints):
    """The steps of the checkpoints that have their name."""
    return [int(path.name.removeprefix("step_")) for path in checkpoints.glob("step_*")]


def assert_same_end(path, expected):
    """The same weights and the same log, bit for bit."""
    for name, weight in torch.load(expected / "result.pt").items():
        assert torch.equal(weight, torch.load(path / "result.pt")[name]), name
    logs = [list(map(untimed, read_log(folder))) for folder in (path, expected)]
    assert logs[0] == logs[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "whole"
    start_training(path).join()
    return path


@pytest.mark.slow
def test_killed_at_random_steps_it_ends_in_the_same_weights(uninterrupted, tmp_path):
    rng, path, in_the_middle = random.Random(0), tmp_path / "killed", 0
    for target in sorted(rng.sample(range(3, STEPS - 20), 7)):
        process = start_training(path, pause=0.01)
        names = checkpoints_of(path)
        wait_for(lambda n=names, t=target: max(steps_of(n), default=0) >= t, process)
        time.sleep(rng.uniform(0, 0.02))  # also while a checkpoint is written
        process.kill()
        process.join()
        in_the_middle += max(steps_of(names)) < STEPS
    assert in_the_middle == 7
    start_training(path).join()
    assert_same_end(path, uninterrupted)


@pytest.mark.parametrize(
    ("number", "workers"),
    [(signal.SIGTERM, 1), (signal.SIGINT, 0), (signal.SIGHUP, 0), (signal.SIGUSR2, 0)],
)
def test_a_signal_leaves_a_checkpoint_of_that_step(uninterrupted, tmp_path, number, workers):
    path = tmp_path / "stopped"
    # the only checkpoint is that of the signal
    changes = {"checkpoint_every": 10**6, "num_workers": workers, "log_every": 1}
    process = start_training(path, pause=0.03, **changes)
    log = path / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 9, process)
    os.kill(process.pid, number)
    (path / "told").touch()
    process.join()
    assert process.exitcode == 1  # of the exception; programs end with 128 + the number
    checkpoint = newest_checkpoint(path)
    assert len(read_log(path)) == int(checkpoint.name.removeprefix("step_")) >= 10
    assert not (path / "result.pt").exists()
    start_training(path, **changes).join()
    weights = torch.load(path / "result.pt")
    for name, weight in torch.load(uninterrupted / "result.pt").items():
        assert torch.equal(weight, weights[name]), name


def test_the_newest_checkpoints_are_kept_and_no_half_one_is_used(data, tmp_path, monkeypatch):
    def fsync(file):  # Windows syncs files that may be written only
        assert fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY

    monkeypatch.setattr(os, "fsync", fsync)
    (tmp_path / "checkpoints" / "unfinished").mkdir(parents=True)
    assert newest_checkpoint(tmp_path) is None
    fit(noisy_network(), data, compute_loss, arguments(tmp_path, checkpoint_every=2))
    names = sorted(path.name for path in checkpoints_of(tmp_path).iterdir())
    assert names == ["step_00000010", "step_00000012"]
    assert newest_checkpoint(tmp_path).name == "step_00000012"
    remove_checkpoints(tmp_path)
    assert newest_checkpoint(tmp_path) is None


def test_a_full_disk_keeps_the_last_good_checkpoint(data, tmp_path, monkeypatch):
    save_state, calls = Accelerator.save_state, []

    def save_until_full(self, folder):
        calls.append(folder)
        save_state(self, folder)
        if len(calls) == 2:
            os.unlink(os.path.join(folder, "optimizer.bin"))
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Accelerator, "save_state", save_until_full)
    with pytest.raises(OSError, match="No space left on device"):
        fit(noisy_network(), data, compute_loss, arguments(tmp_path))
    assert newest_checkpoint(tmp_path).name == "step_00000005"
    monkeypatch.undo()
    expected = fit(noisy_network(), data, compute_loss, arguments(tmp_path / "other"))
    resumed = fit(noisy_network(), data, compute_loss, arguments(tmp_path))
    for name, weight in expected.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name])


class Broken(FeatureDataset):
    """Rows that a worker can't hand over, once five steps are read."""

    calls = 0

    def __getitems__(self, rows):
        self.calls += 1
        if self.calls > 5:
            # no file can grow, and shared memory is one: as where /dev/shm is full
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        return super().__getitems__(rows)


def test_a_worker_that_can_not_hand_over_a_batch_ends_the_run(data, tmp_path):
    settings = arguments(tmp_path, num_workers=1, checkpoint_every=2)
    with pytest.raises((RuntimeError, ConnectionError)):
        fit(noisy_network(), Broken(data.features, data.labels), compute_loss, settings)
    assert newest_checkpoint(tmp_path).name == "step_00000004"


REFUSED = {
    "rows": ({"batch_size": 64}, "the dataset has 37"),
    "parts": ({"per_device_batch_size": -1}, "--per_device_batch_size"),
    "rate": ({"learning_rate": 0.0}, "--learning_rate"),
    "rates": ({"learning_rate": 1e-7}, "--final_learning_rate must lie"),
    "seed": ({"seed": 2**32}, "--seed must lie between 0"),
    "tracker": ({"report_to": "trackio"}, "pip install trackio"),
    "matrices": ({"optimizer": "muon"}, "blocks and layers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_training_is_refused_before_its_first_step(data, tmp_path, monkeypatch, case):
    changes, message = REFUSED[case]
    if case == "tracker":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        fit(noisy_network(), data, None, arguments(tmp_path, **changes))


def test_a_warm_up_longer_than_the_run_is_said(data, tmp_path, caplog):
    fit(noisy_network(), data, compute_loss, arguments(tmp_path, steps=2))
    assert "--warmup_steps 2 of a run of 2 steps" in caplog.text

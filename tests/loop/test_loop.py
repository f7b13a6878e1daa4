import json
import math
import re
import time

import pytest
import torch
from torch import nn

from raptor_hf.loop.checkpoints import newest_checkpoint, remove_checkpoints
from raptor_hf.loop.fit import fit
from raptor_hf.loop.log import read_log
from raptor_hf.loop.numbers import StepResult
from raptor_hf.loop.sampler import BatchShare, StepSampler
from tests.helpers import Killed, arguments, compute_loss, noisy_network, untimed


@pytest.mark.parametrize("killed_at", [3, 5, 8, 11])
def test_resume_equals_uninterrupted_bit_for_bit(data, tmp_path, killed_at):
    whole = fit(noisy_network(), data, compute_loss, arguments(tmp_path / "whole"))

    def killed(module, batch, progress):
        if round(progress * 12) == killed_at:
            raise Killed
        return compute_loss(module, batch, progress)

    with pytest.raises(Killed):
        fit(noisy_network(), data, killed, arguments(tmp_path / "parts"))
    checkpoint = newest_checkpoint(tmp_path / "parts")
    assert (checkpoint and checkpoint.name) == {
        3: None,
        5: "step_00000005",
        8: "step_00000005",
    }.get(killed_at, "step_00000010")
    torch.manual_seed(123)  # the state of the process must not matter
    parts = fit(noisy_network(), data, compute_loss, arguments(tmp_path / "parts"))
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, parts.state_dict()[name]), name
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    for left, right in zip(*map(lambda log: map(json.loads, log), logs), strict=True):
        assert untimed(left) == untimed(right)


def test_a_half_written_checkpoint_is_not_used(data, tmp_path):
    (tmp_path / "checkpoints" / "unfinished").mkdir(parents=True)
    assert newest_checkpoint(tmp_path) is None
    fit(noisy_network(), data, compute_loss, arguments(tmp_path))
    assert newest_checkpoint(tmp_path).name == "step_00000012"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    remove_checkpoints(tmp_path)
    assert newest_checkpoint(tmp_path) is None


def test_nan_stops_with_step_and_what_to_do(data, tmp_path):
    def broken(module, batch, progress):
        loss = compute_loss(module, batch, progress).loss
        return StepResult(loss * math.nan if progress >= 7 / 12 else loss)

    with pytest.raises(
        FloatingPointError, match="loss is nan at step 7 .* smaller --learning_rate"
    ):
        fit(noisy_network(), data, broken, arguments(tmp_path))
    assert newest_checkpoint(tmp_path).name == "step_00000005"


def test_what_goes_by_before_the_first_step_is_told(data, tmp_path, capsys):
    fit(noisy_network(), data, compute_loss, arguments(tmp_path, timings=True))
    lines = capsys.readouterr().out.partition("until the first step:\n")[2].splitlines()[-5:]
    names = ["teacher, images, blocks", "optimiser, checkpoint, log", "workers, first batch"]
    names += ["compiling, first step", "in all"]
    found = [re.fullmatch(r"  (.*?) +(\d+\.\d\d) s", line) for line in lines]
    assert [match[1] for match in found] == names
    assert all(float(match[2]) >= 0 for match in found)


def test_an_epoch_shows_every_row_once():
    sampler = StepSampler(12, BatchShare(4), seed=0, first=0, steps=6)
    batches = list(sampler)
    for epoch in (batches[:3], batches[3:]):
        assert sorted(row for batch in epoch for row in batch) == list(range(12))
    assert batches[:3] != batches[3:]
    assert list(StepSampler(12, BatchShare(4), seed=0, first=4, steps=6)) == batches[4:]
    assert list(StepSampler(12, BatchShare(4), seed=1, first=0, steps=6)) != batches


def test_too_few_rows_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match="batch of 64 needs at least as many rows; .* has 37"):
        fit(noisy_network(), data, compute_loss, arguments(tmp_path, batch_size=64))


def test_schedule_warms_up_and_falls_to_the_final_rate(data, tmp_path):
    fit(noisy_network(), data, compute_loss, arguments(tmp_path, log_every=1))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["learning_rate"] for line in lines}
    assert rates[1] == pytest.approx(0.005)
    assert rates[2] == pytest.approx(0.01)
    middle = 1e-6 + (0.01 - 1e-6) * (1 + math.cos(math.pi * 0.5)) / 2
    assert rates[7] == pytest.approx(middle)
    assert rates[12] == pytest.approx(1e-6)


def test_parts_are_clipped_each_for_itself(data, tmp_path, monkeypatch):
    clipped = []
    original = nn.utils.clip_grad_norm_

    def spy(parameters, norm):
        clipped.append([id(parameter) for parameter in parameters])
        return original(parameters, norm)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", spy)
    network = noisy_network()
    fit(
        network,
        data,
        compute_loss,
        arguments(tmp_path, steps=1),
        clip_apart=[network[0], network[2]],
    )
    assert clipped == [[id(p) for p in part.parameters()] for part in (network[0], network[2])]


def test_validation_runs_at_intervals_and_at_the_end_and_changes_nothing(data, tmp_path):
    calls = []

    def validate():
        calls.append(torch.is_grad_enabled())
        torch.rand(3)  # draws must not reach the training
        return {"score": float(len(calls))}

    plain = fit(noisy_network(), data, compute_loss, arguments(tmp_path / "plain"))
    module = noisy_network()
    watched = fit(
        module, data, compute_loss, arguments(tmp_path / "watched"),
        validate=validate, validate_every=5,
    )  # fmt: skip
    assert calls == [False, False, False]  # after 5, 10 and 12 steps, without gradients
    lines = [json.loads(x) for x in (tmp_path / "watched" / "log.jsonl").read_text().splitlines()]
    assert [(x["step"], x["score"]) for x in lines if "score" in x] == [(5, 1), (10, 2), (12, 3)]
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, watched.state_dict()[name])


def test_intervals_of_zero_mean_never_but_for_the_last_step(data, tmp_path):
    options = {"steps": 5, "log_every": 0, "checkpoint_every": 0}
    fit(noisy_network(), data, compute_loss, arguments(tmp_path, **options))
    assert [line["step"] for line in read_log(tmp_path)] == [5]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000005"]


def test_no_steps_leave_the_module_as_it_is(data, tmp_path):
    module = noisy_network()
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    fit(module, data, compute_loss, arguments(tmp_path, steps=0), validate=lambda: {"score": 1.0})
    assert all(torch.equal(weight, before[name]) for name, weight in module.state_dict().items())
    assert json.loads((tmp_path / "log.jsonl").read_text())["score"] == 1.0


def test_tensorboard_gets_what_the_log_gets(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(
        noisy_network(), data, compute_loss, arguments(tmp_path, report_to="tensorboard"),
        validate=lambda: {"score": 0.5},
    )  # fmt: skip
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    expected = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(step, pytest.approx(loss)) for step, loss in expected]
    assert [event.value for event in events.Scalars("score")] == [0.5]


def killed_at(progress_of_death):
    def killed(module, batch, progress):
        if progress > progress_of_death:
            raise Killed
        return compute_loss(module, batch, progress)

    return killed


def test_tensorboard_shows_every_step_of_a_resumed_run_once(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = arguments(tmp_path, report_to="tensorboard")
    with pytest.raises(Killed):
        fit(noisy_network(), data, killed_at(8.5 / 12), settings)  # three steps after a checkpoint
    fit(noisy_network(), data, compute_loss, settings)
    events = EventAccumulator(str(tmp_path / "logs")).Reload().Scalars("loss")
    assert [event.step for event in events] == [2, 4, 6, 8, 10, 12]


def test_weights_and_biases_goes_on_with_the_same_run_offline(data, tmp_path, monkeypatch):
    import wandb

    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    settings = arguments(tmp_path, report_to="wandb")
    with pytest.raises(Killed):
        fit(noisy_network(), data, killed_at(8.5 / 12), settings)
    wandb.finish()
    (first,) = tmp_path.glob("wandb/offline-run-*")
    while time.strftime("%Y%m%d_%H%M%S") in first.name:  # a second names the folder of a run
        time.sleep(0.05)
    fit(noisy_network(), data, compute_loss, settings)
    identity = (tmp_path / "tracker_id").read_text()
    runs = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert [run.name for run in runs] == [f"run-{identity}.wandb"] * 2
    deadline = time.monotonic() + 120
    while b"loss" not in runs[1].read_bytes():  # a process of wandb's own writes it
        assert time.monotonic() < deadline, "no loss was recorded"
        time.sleep(0.05)


def test_a_tracker_that_is_not_installed_is_said_before_training(data, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="report_to='wandb' needs .* pip install wandb"):
        fit(noisy_network(), data, compute_loss, arguments(tmp_path, report_to="wandb"))


def test_new_views_number_the_rows_on_from_epoch_to_epoch():
    sampler = StepSampler(4, BatchShare(2), seed=0, first=0, steps=4, new_views=True)
    rows = [row for batch in sampler for row in batch]
    assert sorted(rows[:4]) == [0, 1, 2, 3] and sorted(rows[4:]) == [4, 5, 6, 7]
    resumed = StepSampler(4, BatchShare(2), seed=0, first=3, steps=4, new_views=True)
    assert list(resumed) == [rows[6:]]


def test_parts_have_learning_rates_of_their_own(data, tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.parts = nn.ModuleList([nn.Linear(5, 2), nn.Linear(5, 2)])
            self.parts[1].load_state_dict(self.parts[0].state_dict())

        def forward(self, features):
            return [part(features) for part in self.parts]

    def loss_of_both(module, batch, progress):
        logits = module(batch["features"])
        return StepResult(sum(nn.functional.cross_entropy(x, batch["label"]) for x in logits))

    module = Two()
    before = module.parts[0].weight.clone()
    fit(
        module, data, loss_of_both, arguments(tmp_path, steps=1, warmup_steps=0),
        clip_apart=list(module.parts), learning_rates=[0.01, 0.001],
    )  # fmt: skip
    moved = [(part.weight - before).abs().mean().item() for part in module.parts]
    assert moved[0] == pytest.approx(
        10 * moved[1], rel=1e-3
    )  # Adam's first step has the rate's size

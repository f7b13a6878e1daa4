"""`fit`: resume, the order of the data, the schedule, validation, the log and its trackers."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from raptor_hf.loop import StepResult, Validation, fit, newest_checkpoint, read_log
from raptor_hf.loop.batches import StepSampler
from raptor_hf.loop.setup import make_accelerator
from tests.helpers import Killed, arguments, compute_loss, noisy_network, untimed


def killed_at(step):
    """A `compute_loss` that ends the process after so many of twelve steps."""

    def killed(module, batch, progress):
        if round(progress * 12) == step:
            raise Killed
        return compute_loss(module, batch, progress)

    return killed


def assert_same_weights(module, expected):
    for name, weight in expected.state_dict().items():
        assert torch.equal(weight, module.state_dict()[name]), name


@pytest.mark.parametrize("killed", [3, 5, 8, 11])
def test_resume_equals_uninterrupted_bit_for_bit(data, tmp_path, killed):
    whole = fit(noisy_network(), data, compute_loss, arguments(tmp_path / "whole"))
    with pytest.raises(Killed):
        fit(noisy_network(), data, killed_at(killed), arguments(tmp_path / "parts"))
    checkpoint = newest_checkpoint(tmp_path / "parts")
    names = {3: None, 5: "step_00000005", 8: "step_00000005", 11: "step_00000010"}
    assert (checkpoint and checkpoint.name) == names[killed]
    torch.manual_seed(123)  # the state of the process must not matter
    parts = fit(noisy_network(), data, compute_loss, arguments(tmp_path / "parts"))
    assert_same_weights(parts, whole)
    logs = [list(map(untimed, read_log(tmp_path / name))) for name in ("parts", "whole")]
    assert logs[0] == logs[1]


def sampler(rows, batch_size, *, processes=1, index=0, parts=1, seed=0, steps=1, **options):
    settings = arguments("unused", batch_size=batch_size, seed=seed, steps=steps)
    launched = SimpleNamespace(
        num_processes=processes, process_index=index, gradient_accumulation_steps=parts
    )
    return StepSampler(rows, settings, launched, **options)


def test_an_epoch_shows_every_row_once():
    batches = list(sampler(12, 4, steps=6))
    for epoch in (batches[:3], batches[3:]):
        assert sorted(row for batch in epoch for row in batch) == list(range(12))
    assert batches[:3] != batches[3:]
    assert list(sampler(12, 4, first=4, steps=6)) == batches[4:]
    assert list(sampler(12, 4, seed=1, steps=6)) != batches


def test_new_views_number_the_rows_on_from_epoch_to_epoch():
    rows = [row for batch in sampler(4, 2, steps=4, new_views=True) for row in batch]
    assert sorted(rows[:4]) == [0, 1, 2, 3] and sorted(rows[4:]) == [4, 5, 6, 7]
    assert list(sampler(4, 2, first=3, steps=4, new_views=True)) == [rows[6:]]


@pytest.mark.parametrize(("processes", "parts"), [(1, 1), (2, 1), (3, 2), (7, 1)])
def test_processes_share_the_same_batches(processes, parts):
    options = {"seed": 1, "first": 2, "steps": 5}
    whole = list(sampler(40, 17, **options))
    samplers = [
        sampler(40, 17, processes=processes, index=index, parts=parts, **options)
        for index in range(processes)
    ]
    assert len(samplers[0]) == 3 * parts
    for step, batch in zip((2, 3, 4), whole, strict=True):
        split = [part for one in samplers for part in one.parts(step)]
        assert [row for part in split for row in part] == batch
        assert max(map(len, split)) - min(map(len, split)) <= 2
    with pytest.raises(ValueError, match="18 processes with 1 parts"):
        sampler(40, 17, processes=18)


PARTS = [(0, 1, 1), (9, 1, 2), (4, 1, 3), (4, 8, 8)]


@pytest.mark.parametrize(("largest", "least", "parts"), PARTS)
def test_parts_are_as_few_as_fit(tmp_path, monkeypatch, largest, least, parts):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(least))
    settings = arguments(tmp_path, batch_size=12, per_device_batch_size=largest)
    assert make_accelerator(settings).gradient_accumulation_steps == parts


def test_schedule_warms_up_and_falls_to_the_final_rate(data, tmp_path):
    fit(noisy_network(), data, compute_loss, arguments(tmp_path, log_every=1))
    rates = {line["step"]: line["learning_rate"] for line in read_log(tmp_path)}
    middle = 1e-6 + (0.01 - 1e-6) * (1 + math.cos(math.pi * 0.5)) / 2
    expected = {1: 0.005, 2: 0.01, 7: middle, 12: 1e-6}
    assert {step: rates[step] for step in expected} == pytest.approx(expected)


def test_groups_have_their_own_learning_rates_and_are_clipped_by_themselves(
    data, tmp_path, monkeypatch
):
    clipped, clip = [], nn.utils.clip_grad_norm_

    def spy(parameters, norm):
        clipped.append([id(parameter) for parameter in parameters])
        return clip(parameters, norm)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", spy)
    module = nn.ModuleList([nn.Linear(5, 2), nn.Linear(5, 2)])
    module[1].load_state_dict(module[0].state_dict())
    before = module[0].weight.clone()

    def loss_of_both(module, batch, progress):
        logits = [part(batch["features"]) for part in module]
        return StepResult(sum(nn.functional.cross_entropy(x, batch["label"]) for x in logits))

    parameters = [list(part.parameters()) for part in module]
    groups = [{"params": parameters[0], "lr": 0.01}, {"params": parameters[1], "lr": 0.001}]
    settings = arguments(tmp_path, steps=1, warmup_steps=0)
    fit(module, data, loss_of_both, settings, groups=groups)
    assert clipped == [[id(p) for p in group] for group in parameters]
    # Adam's first step has the size of the learning rate
    moved = [(part.weight - before).abs().mean().item() for part in module]
    assert moved[0] == pytest.approx(10 * moved[1], rel=1e-3)


def test_validation_runs_at_intervals_and_at_the_end_and_changes_nothing(data, tmp_path):
    calls = []

    def measure():
        calls.append(torch.is_grad_enabled())
        torch.rand(3)  # draws must not reach the training
        return {"score": float(len(calls))}

    plain = fit(noisy_network(), data, compute_loss, arguments(tmp_path / "plain"))
    settings = arguments(tmp_path / "validated")
    validation = Validation(measure, every=5)
    validated = fit(noisy_network(), data, compute_loss, settings, validation=validation)
    assert calls == [False, False, False]  # after 5, 10 and 12 steps, without gradients
    lines = [line for line in read_log(tmp_path / "validated") if "score" in line]
    assert [(line["step"], line["score"]) for line in lines] == [(5, 1), (10, 2), (12, 3)]
    assert_same_weights(validated, plain)


@pytest.mark.parametrize("stopped", [10, 12])
def test_a_resumed_run_logs_each_validation_once(data, tmp_path, stopped):
    """Killed right after the checkpoint of a step that was validated."""
    validation = Validation(lambda: {"score": 1.0}, every=5)
    fit(noisy_network(), data, compute_loss, arguments(tmp_path), validation=validation)
    expected = list(map(untimed, read_log(tmp_path)))
    for checkpoint in tmp_path.glob("checkpoints/step_*"):
        if int(checkpoint.name[5:]) > stopped:
            checkpoint.rename(tmp_path / "later")
    fit(noisy_network(), data, compute_loss, arguments(tmp_path), validation=validation)
    assert list(map(untimed, read_log(tmp_path))) == expected


def test_intervals_of_zero_mean_only_the_last_step(data, tmp_path):
    options = {"steps": 5, "log_every": 0, "checkpoint_every": 0}
    fit(noisy_network(), data, compute_loss, arguments(tmp_path, **options))
    assert [line["step"] for line in read_log(tmp_path)] == [5]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000005"]


def test_tensorboard_shows_every_step_of_a_resumed_run_once(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = arguments(tmp_path, report_to="tensorboard")
    validation = Validation(lambda: {"score": 0.5})
    with pytest.raises(Killed):
        fit(noisy_network(), data, killed_at(9), settings)  # four steps after a checkpoint
    fit(noisy_network(), data, compute_loss, settings, validation=validation)
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    logged = [(line["step"], line["loss"]) for line in read_log(tmp_path) if "loss" in line]
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(step, pytest.approx(loss)) for step, loss in logged]
    assert [step for step, _ in found] == [2, 4, 6, 8, 10, 12]
    assert [event.value for event in events.Scalars("score")] == [0.5]

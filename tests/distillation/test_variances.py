"""The loss over the variance of the teacher's states: numbers by hand, R², resume, processes."""

import numpy as np
import pytest
import torch

from raptor_hf import make_raptor
from raptor_hf.activations.store import load_activations
from raptor_hf.activations.writing import write_activations
from raptor_hf.distillation.arguments import ObjectiveArguments
from raptor_hf.distillation.blocks import chain_of
from raptor_hf.distillation.matching import TrajectoryMatching
from raptor_hf.distillation.objective import state_variances, token_loss
from raptor_hf.distillation.training import train_chains
from raptor_hf.loop.arguments import LoopArguments
from raptor_hf.metrics import RSquared, state_statistics

GROUPS = {"cls": slice(0, 1), "patches": slice(1, None)}


def loop_of(folder, **options):
    options = {"steps": 6, "batch_size": 4, "warmup_steps": 1, "report_to": "none", **options}
    return LoopArguments(output_dir=str(folder), log_every=1, **options)


def test_errors_are_divided_by_hand():
    """Two layers, cls and two patches, one channel: errors 1, 2, 3 and 4, 5, 6."""
    target = torch.zeros(1, 2, 3, 1)
    prediction = torch.tensor([[1.0, 2, 3], [4, 5, 6]]).view(1, 2, 3, 1)
    variances = torch.tensor([[0.5, 2.0], [4.0, 10.0]])  # of cls and of patches, by layer
    found = token_loss(prediction, target, groups=GROUPS, variances=variances)
    # squares 1 4 9 over 0.5 4 4; squares 16 25 36 over 2 10 10; the mean of all six
    assert float(found) == pytest.approx((2 + 1 + 2.25 + 8 + 2.5 + 3.6) / 6)
    weights = {"cls": 0.25, "registers": 0.0, "patches": 0.75}
    found = token_loss(prediction, target, groups=GROUPS, weights=weights, variances=variances)
    cls, patches = (2 + 8) / 2, (1 + 2.25 + 2.5 + 3.6) / 4
    assert float(found) == pytest.approx(0.25 * cls + 0.75 * patches)


def test_variances_are_numpys(store):
    activations = load_activations(store)
    variances = state_variances(activations)
    states = activations.__getitems__(range(len(activations)))["states"].double().numpy()
    groups = activations.layout.groups()
    assert set(variances) == set(groups)
    for name, tokens in groups.items():
        of_group = states[:, :, tokens]
        expected = of_group.var(axis=(0, 2)).mean(axis=-1)  # around each channel's mean
        np.testing.assert_allclose(variances[name], expected, rtol=1e-4, atol=1e-9)


def test_the_loss_is_one_minus_r2(teacher, store):
    """Of all rows at once: the mean over layers of 1 − R² of patches, as it is reported."""
    activations = load_activations(store)
    model = make_raptor(teacher, [4, 2], init="teacher")
    states = activations.__getitems__(range(len(activations)))["states"].float()
    groups = activations.layout.groups()
    weights = {name: float(name == "patches") for name in ("cls", "registers", "patches")}
    arguments = ObjectiveArguments(objective="autoregressive", normalize="group")
    module = TrajectoryMatching(
        [chain_of(model, weights)], arguments, groups, state_variances(activations)
    )
    with torch.no_grad():
        loss = float(module(states, 0.5)["0-6"][0])
        prediction = model.rollout(states[:, 0])
    metric = RSquared(keep_in_memory=True)
    metric.add_batch(**state_statistics(prediction=prediction, target=states, groups=groups))
    assert loss == pytest.approx(1 - metric.compute()["mean"]["patches"], rel=1e-3)


def test_a_chain_takes_the_variances_of_its_own_layers(teacher, store):
    activations = load_activations(store)
    model = make_raptor(teacher, [4, 2], init="teacher")
    whole = chain_of(model, None)
    late = whole._replace(spans=whole.spans[1:])
    groups, states = activations.layout.groups(), activations.__getitems__(range(5))["states"]
    arguments = ObjectiveArguments(objective="autoregressive", normalize="group")
    variances = state_variances(activations)
    own = {name: values[4:] for name, values in variances.items()}
    both = TrajectoryMatching([whole, late], arguments, groups, variances)
    alone = TrajectoryMatching([late], arguments, groups, own)
    with torch.no_grad():
        found = both(states.float(), 0.9)["4-6"][0]
        assert torch.equal(found, alone(states[:, 4:].float(), 0.9)["4-6"][0])


def test_states_that_do_not_vary_are_refused(teacher, store):
    activations = load_activations(store)
    model = make_raptor(teacher, [4, 2], init="teacher")
    variances = state_variances(activations)
    variances["cls"][3] = 0.0
    arguments = ObjectiveArguments(normalize="group")
    with pytest.raises(ValueError, match="the same in all images"):
        groups = activations.layout.groups()
        TrajectoryMatching([chain_of(model, None)], arguments, groups, variances)


def train(teacher, activations, loop):
    torch.manual_seed(0)
    model = make_raptor(teacher, [4, 2], init="teacher")
    arguments = ObjectiveArguments(objective="autoregressive", normalize="group")
    train_chains([chain_of(model, None)], teacher, activations, arguments, loop)
    return model.state_dict()


def test_a_resumed_run_goes_on_with_its_variances(teacher, images, tmp_path, monkeypatch):
    """They lie in the checkpoint, and win over what is measured when the run is resumed."""
    (tmp_path / "states").mkdir()
    write_activations(teacher, images, tmp_path / "states", dtype="float32")
    activations = load_activations(tmp_path / "states")
    expected = train(teacher, activations, loop_of(tmp_path / "whole"))

    read, calls = type(activations).__getitems__, []

    def fail_at_last(self, rows):
        calls.append(rows)
        if len(calls) == 6:  # the variances, then the batches of five steps
            raise OSError("the disk is gone")
        return read(self, rows)

    monkeypatch.setattr(type(activations), "__getitems__", fail_at_last)
    with pytest.raises(OSError, match="the disk is gone"):
        train(teacher, activations, loop_of(tmp_path / "parts", checkpoint_every=2))
    monkeypatch.undo()
    monkeypatch.setattr(
        "raptor_hf.distillation.training.state_variances",
        lambda _: {name: [7.0] * 7 for name in ("cls", "registers", "patches")},
    )
    found = train(teacher, activations, loop_of(tmp_path / "parts", checkpoint_every=2))
    for name, weight in expected.items():
        assert torch.equal(weight, found[name]), name

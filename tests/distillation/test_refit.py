import copy

import pytest
import torch

from raptor_hf import RaptorModel
from raptor_hf.activations.store import load_activations
from raptor_hf.activations.writing import write_activations
from raptor_hf.distillation.blocks import Span
from raptor_hf.distillation.refit import RefitArguments, refit_blocks, refit_spans


def spans_of(model):
    return [Span(b, *span) for b, span in zip(model.blocks, model.config.spans(), strict=True)]


def error_of(model, activations):
    states = activations.__getitems__(range(len(activations)))["states"].float()
    with torch.no_grad():
        return float((model.rollout(states[:, 0]) - states).square().mean())


@pytest.fixture
def recurrent_teacher(teacher):
    """A teacher whose layers 1-4 are one layer, and 5-6 another: two blocks can be exact."""
    for layer, source in enumerate((0, 0, 0, 0, 5, 5)):
        weights = copy.deepcopy(teacher.encoder.layer[source].state_dict())
        teacher.encoder.layer[layer].load_state_dict(weights)
    return teacher


def test_lost_projections_are_found_again(recurrent_teacher, images, tmp_path, monkeypatch):
    monkeypatch.setattr("raptor_hf.distillation.refit.RIDGE_PROJECTIONS", 1e-7)
    (tmp_path / "states").mkdir()
    many = copy.copy(images)
    many.views = 40  # random states, more tokens than features
    write_activations(recurrent_teacher, many, tmp_path / "states", dtype="float32")
    activations = load_activations(tmp_path / "states")
    model = RaptorModel.from_teacher(recurrent_teacher, [4, 2], init="teacher")
    for block in model.blocks:  # depth scales of exactly 1, to begin with
        for weight in block.depth_scaling.fc2.parameters():
            torch.nn.init.zeros_(weight)
    assert error_of(model, activations) < 1e-10  # layers that are alike are their own mean
    for block in model.blocks:
        for projection in (block.attention.proj, block.ffn.fc2):
            torch.nn.init.normal_(projection.weight, std=0.3)
            torch.nn.init.normal_(projection.bias, std=0.3)
    lost = error_of(model, activations)
    for _ in range(4):  # each time it rolls out anew with what it has found
        refit_spans(spans_of(model), activations, 200)
    assert error_of(model, activations) < lost / 100


@pytest.mark.parametrize("projections", [False, True])
def test_a_refit_follows_the_teacher_better(teacher, store, projections):
    activations = load_activations(store)
    model = RaptorModel.from_teacher(teacher, [4, 2], init="teacher")
    before, weight = error_of(model, activations), model.blocks[0].ffn.fc2.weight.clone()
    refit_spans(spans_of(model), activations, 10, projections=projections)
    assert error_of(model, activations) < 0.95 * before
    assert torch.equal(weight, model.blocks[0].ffn.fc2.weight) is not projections


def test_depth_scales_are_found_by_hand(teacher, store):
    """One layer of a block alone: twice the block's output is an output scale of 2."""
    activations = load_activations(store)
    model = RaptorModel.from_teacher(teacher, [6], init="teacher")
    [span] = spans_of(model)
    span.block.depth_scaling.fc2.weight.data.zero_()
    span.block.depth_scaling.fc2.bias.data.zero_()
    states = activations.__getitems__(range(10))["states"].float()

    class Doubled:
        layers, layout = [0, 1], activations.layout

        def __len__(self):
            return 10

        def __getitems__(self, rows):
            return {"rows": torch.tensor(rows)}

        def states(self, batch):
            with torch.no_grad():
                before = states[batch["rows"], 0]
                return torch.stack([before, 1.5 * span.block(before, 1)], dim=1)

    with torch.no_grad():
        before = span.block.depth_scaling(torch.tensor([[1.0]]))
        assert all(torch.equal(scale, torch.ones(1, 24)) for scale in before)
    refit_spans([span._replace(stop=1)], Doubled(), 10, projections=False)
    output = span.block.depth_scaling(torch.tensor([[1.0]]))[2]
    assert 1.2 < output.median() < 1.5  # pulled towards 1


def test_there_must_be_something_to_refit(teacher, store):
    activations = load_activations(store)
    model = RaptorModel.from_teacher(teacher, [4, 2], init="teacher")
    spans = spans_of(model)
    before = copy.deepcopy(model.state_dict())
    refit_blocks(spans, activations, RefitArguments(), init="random")  # none asked for
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    for init in ("random", ""):
        with pytest.raises(ValueError, match="--refit scales needs new blocks"):
            refit_blocks(spans, activations, RefitArguments(refit="scales"), init=init)

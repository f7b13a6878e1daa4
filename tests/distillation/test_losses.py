import pytest
import torch

from raptor_hf import make_raptor
from raptor_hf.configuration_raptor import token_layout
from raptor_hf.distillation.arguments import ObjectiveArguments, parse_token_weights
from raptor_hf.distillation.blocks import (
    Chain,
    Span,
    make_span,
    raptor_from_blocks,
    save_blocks,
)
from raptor_hf.distillation.matching import TrajectoryMatching
from raptor_hf.distillation.objective import token_loss
from raptor_hf.distillation.rollout import rollout
from tests.helpers import assert_same_outputs, randomised
from training.pretrain_blocks import Arguments, read_spans

GROUPS = {"cls": slice(0, 1), "registers": slice(1, 3), "patches": slice(3, None)}


@pytest.fixture
def raptor(teacher):
    return randomised(make_raptor(teacher, [3, 2, 1]))


@pytest.fixture
def trajectory():
    return torch.randn(2, 7, 7, 24)


def spans_of(raptor):
    return [Span(b, *s) for b, s in zip(raptor.blocks, raptor.config.spans(), strict=True)]


# teacher forcing, rollouts of each phase, from end to end, a reset in the middle of a phase
@pytest.mark.parametrize("resets", [set(range(6)), {0, 3, 5}, {0}, {0, 2}])
def test_a_rollout_takes_the_teachers_state_at_resets(raptor, trajectory, resets):
    predictions = rollout(spans_of(raptor), trajectory, resets=resets)
    state = None
    for layer in range(1, 7):
        if layer - 1 in resets:
            state = trajectory[:, layer - 1]
        state = raptor.advance(state, layer)
        torch.testing.assert_close(predictions[:, layer - 1], state)


def test_token_loss_by_hand():
    target = torch.zeros(1, 7, 2)
    prediction = torch.zeros(1, 7, 2)
    prediction[:, 0] = 3.0  # cls: mean squared error 9
    prediction[:, 1] = 2.0  # registers: (4 + 0) / 2 = 2
    prediction[:, 3:] = 1.0  # patches: 1
    assert token_loss(prediction, target, groups=GROUPS).item() == pytest.approx((9 + 4 + 4) / 7)
    weights = {"cls": 0.5, "registers": 0.2, "patches": 0.3}
    loss = token_loss(prediction, target, groups=GROUPS, weights=weights)
    assert loss.item() == pytest.approx(0.5 * 9 + 0.2 * 2 + 0.3 * 1)
    # without registers the other weights are scaled to the same sum
    groups = {"cls": slice(0, 1), "patches": slice(3, None)}
    loss = token_loss(prediction, target, groups=groups, weights=weights)
    assert loss.item() == pytest.approx((0.5 * 9 + 0.3 * 1) / 0.8)


def test_forcing_fades_over_a_quarter_of_the_steps():
    assert [ObjectiveArguments().forcing(p) for p in (0, 0.125, 0.25, 0.9)] == [1, 0.5, 0, 0]
    assert ObjectiveArguments(objective="teacher_forcing").forcing(0.9) == 1
    assert ObjectiveArguments(objective="autoregressive").forcing(0.0) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "teacher_forcing", "phase_fraction": 0.5}, "for rollouts"),
        ({"phase_fraction": 1.5}, "phase_fraction must lie"),
        ({"token_weights": "nan,1,1"}, "three numbers ≥ 0"),
        ({"token_weights": "0.5,0.5"}, "three numbers ≥ 0 .* got '0.5,0.5'"),
        ({"token_weights": "0,0,0"}, "three numbers ≥ 0"),
    ],
)
def test_contradictory_and_wrong_objectives_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveArguments(**options)


def test_token_weights_are_read_in_order():
    assert parse_token_weights("0.45, 0.10, 0.45") == {
        "cls": 0.45, "registers": 0.10, "patches": 0.45
    }  # fmt: skip
    assert parse_token_weights("none") is None


def test_a_chain_mixes_the_two_losses_with_its_own_weights(teacher, trajectory):
    spans = [make_span(teacher, 0, 3), make_span(teacher, 3, 6)]
    for span in spans:
        randomised(span.block)
    weights = {"cls": 0.34, "registers": 0.33, "patches": 0.33}
    chains = [Chain([spans[0]], None), Chain([spans[1]], weights)]
    module = TrajectoryMatching(chains, ObjectiveArguments(), GROUPS)
    losses = module(trajectory, progress=0.1875)  # three quarters of the fading: λ = 0.25
    for (block, start, stop), group_weights in zip(spans, (None, weights), strict=True):
        forced, free, state = [], [], trajectory[:, start]
        for layer in range(start + 1, stop + 1):
            forced.append(block(trajectory[:, layer - 1], torch.tensor([layer])))
            state = block(state, torch.tensor([layer]))
            free.append(state)
        target = trajectory[:, start + 1 : stop + 1]
        expected = sum(
            weight
            * token_loss(torch.stack(states, 1), target, groups=GROUPS, weights=group_weights)
            for weight, states in ((0.25, forced), (0.75, free))
        )
        torch.testing.assert_close(losses[f"{start}-{stop}"][0], expected)


def test_blocks_of_stage_one_become_a_raptor(teacher, tmp_path, trajectory):
    spans = [make_span(teacher, 0, 4), make_span(teacher, 4, 6), make_span(teacher, 0, 2)]
    for span in spans:
        randomised(span.block)
    save_blocks(spans, tmp_path)
    raptor = raptor_from_blocks(teacher, [4, 2], tmp_path)
    for block, span in zip(raptor.blocks, spans, strict=False):
        for name, weight in span.block.state_dict().items():
            assert torch.equal(block.state_dict()[name], weight)
    weights = {"cls": 0.45, "registers": 0.10, "patches": 0.45}
    chain = Chain(
        [Span(b, *s) for b, s in zip(raptor.blocks, [(0, 4), (4, 6)], strict=True)], weights
    )
    objective = ObjectiveArguments(objective="autoregressive")
    loss = TrajectoryMatching([chain], objective, GROUPS)(trajectory, progress=0.0)["0-6"][0]
    prediction = raptor.rollout(trajectory[:, 0])
    expected = token_loss(prediction[:, 1:], trajectory[:, 1:], groups=GROUPS, weights=weights)
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match="has blocks for 0-2, 0-4, 4-6; none for 0-3"):
        raptor_from_blocks(teacher, [3, 3], tmp_path)


def test_a_raptor_learns_on_from_its_blocks(teacher, tmp_path):
    raptor = make_raptor(teacher, [4, 2])
    randomised(raptor)
    raptor.config.weight_bits = 4
    raptor.save_pretrained(tmp_path)
    again = raptor_from_blocks(teacher, [4, 2], tmp_path)
    assert again.config.weight_bits is None
    for name, weight in raptor.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    for name, weight in again.named_parameters():
        assert weight.requires_grad == name.startswith("blocks.")
    with pytest.raises(ValueError, match=r"no Raptor of the phases \[3, 3\]"):
        raptor_from_blocks(teacher, [3, 3], tmp_path)


def test_spans_are_written_start_stop():
    assert read_spans(Arguments(spans=["7-10", "0-7"])) == [(0, 7), (7, 10)]
    for text in ("7", "7-", "a-b", "7:10"):
        with pytest.raises(ValueError, match=f"start-stop, like 0-7; got '{text}'"):
            read_spans(Arguments(spans=[text]))


def test_spans_outside_the_teacher_are_refused(teacher):
    with pytest.raises(ValueError, match="0 ≤ start < stop ≤ 6; got 4-7"):
        make_span(teacher, 4, 7)


def matching(raptor, **options):
    chain = Chain(spans_of(raptor), options.pop("weights", None))
    groups = token_layout(raptor.config).groups()
    return TrajectoryMatching([chain], ObjectiveArguments(**options), groups)


def test_blocks_first_learn_from_the_start_of_their_phases(raptor, trajectory):
    module = matching(raptor, objective="autoregressive", phase_fraction=0.5)
    spans, loss = spans_of(raptor), {"groups": module.groups}
    for progress, resets in ((0.0, {0, 3, 5}), (0.49, {0, 3, 5}), (0.5, {0}), (0.9, {0})):
        expected = token_loss(rollout(spans, trajectory, resets=resets), trajectory[:, 1:], **loss)
        assert_same_outputs(module(trajectory, progress)["0-6"][0], expected)

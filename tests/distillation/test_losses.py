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


def test_resets_at_every_layer_are_teacher_forcing(raptor, trajectory):
    predictions = rollout(spans_of(raptor), trajectory, resets=range(6))
    for layer in range(1, 7):
        expected = raptor.advance(trajectory[:, layer - 1], layer)
        torch.testing.assert_close(predictions[:, layer - 1], expected)


def test_resets_at_phase_starts_roll_out_within_phases(raptor, trajectory):
    predictions = rollout(spans_of(raptor), trajectory, resets={0, 3, 5})
    for start, stop in ((0, 3), (3, 5), (5, 6)):
        state = trajectory[:, start]
        for layer in range(start + 1, stop + 1):
            state = raptor.advance(state, layer)
            torch.testing.assert_close(predictions[:, layer - 1], state)


def test_reset_at_zero_rolls_out_end_to_end(raptor, trajectory):
    predictions = rollout(spans_of(raptor), trajectory, resets={0})
    state = trajectory[:, 0]
    for layer in range(1, 7):
        state = raptor.advance(state, layer)
        torch.testing.assert_close(predictions[:, layer - 1], state)
    torch.testing.assert_close(predictions, raptor.rollout(trajectory[:, 0])[:, 1:])


def test_resets_in_the_middle_of_a_phase(raptor, trajectory):
    predictions = rollout(spans_of(raptor), trajectory, resets={0, 2})
    expected = raptor.advance(trajectory[:, 2], 3)
    torch.testing.assert_close(predictions[:, 2], expected)
    torch.testing.assert_close(predictions[:, 3], raptor.advance(expected, 4))


def test_rollout_refuses_gaps_and_a_missing_start(raptor, trajectory):
    spans = spans_of(raptor)
    with pytest.raises(ValueError, match="must contain the first layer, 0"):
        rollout(spans, trajectory, resets={3})
    with pytest.raises(ValueError, match="one stops at 3, the next starts at 5"):
        rollout([spans[0], spans[2]], trajectory, resets={0})


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


def test_cosine_and_half_half_by_hand():
    target = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    prediction = torch.tensor([[[0.0, 2.0], [3.0, 0.0]]])  # a right angle; the same direction
    groups = {"cls": slice(0, 1), "patches": slice(1, None)}
    cosine = token_loss(prediction, target, groups=groups, loss="cosine")
    assert cosine.item() == pytest.approx((1 + 0) / 2)
    mse = token_loss(prediction, target, groups=groups)
    assert mse.item() == pytest.approx((1 + 4 + 4 + 0) / 4)
    half = token_loss(prediction, target, groups=groups, loss="mse+cosine")
    assert half.item() == pytest.approx(0.5 * 9 / 4 + 0.5 * 1 / 2)
    weights = {"cls": 0.9, "registers": 0.0, "patches": 0.1}
    weighted = token_loss(prediction, target, groups=groups, weights=weights, loss="cosine")
    assert weighted.item() == pytest.approx(0.9)


def test_weights_for_groups_that_are_not_there_are_refused():
    states = torch.zeros(1, 7, 2)
    groups = {"cls": slice(0, 1), "patches": slice(1, None)}
    weights = {"cls": 0.0, "registers": 1.0, "patches": 0.0}
    with pytest.raises(ValueError, match="leave nothing to learn .* groups cls, patches"):
        token_loss(states, states, groups=groups, weights=weights)


def test_noise_is_added_to_every_input(teacher, trajectory):
    class Recorder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inputs = []

        def forward(self, states, depth):
            self.inputs.append(states)
            return torch.zeros_like(states)

    for resets, calls in ((range(6), 1), ({0}, 6)):  # teacher forcing; a rollout
        recorder = Recorder()
        torch.manual_seed(5)
        rollout([Span(recorder, 0, 6)], trajectory, resets=resets, noise_std=0.1)
        assert len(recorder.inputs) == calls
        clean = trajectory[:, :6] if calls == 1 else trajectory[:, 0]
        noise = recorder.inputs[0] - clean
        assert noise.std().item() == pytest.approx(0.1, rel=0.15)
        for later in recorder.inputs[1:]:  # the block returns zeros: all that comes in is noise
            assert later.std().item() == pytest.approx(0.1, rel=0.2)
        torch.manual_seed(5)
        again = Recorder()
        rollout([Span(again, 0, 6)], trajectory, resets=resets, noise_std=0.1)
        assert all(map(torch.equal, recorder.inputs, again.inputs))


def test_forcing_fades_over_a_quarter_of_the_steps():
    assert [ObjectiveArguments().forcing(p) for p in (0, 0.125, 0.25, 0.9)] == [1, 0.5, 0, 0]
    assert ObjectiveArguments(objective="teacher_forcing").forcing(0.9) == 1
    assert ObjectiveArguments(objective="autoregressive").forcing(0.0) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "distill"}, "'annealed', 'autoregressive', 'teacher_forcing'.*; got"),
        ({"loss": "mae"}, "'mse', 'cosine', 'mse\\+cosine'.*; got 'mae'"),
        ({"objective": "teacher_forcing", "phase_fraction": 0.5}, "where rollouts start"),
        ({"phase_fraction": 1.5}, "phase_fraction must lie"),
        ({"noise_std": -1.0}, "must be a number ≥ 0; got -1.0"),
        ({"noise_std": float("nan")}, "must be a number ≥ 0; got nan"),
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
        torch.testing.assert_close(losses[f"{start}-{stop}"].loss, expected)


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
    loss = TrajectoryMatching([chain], objective, GROUPS)(trajectory, progress=0.0)["0-6"].loss
    prediction = raptor.rollout(trajectory[:, 0])
    expected = token_loss(prediction[:, 1:], trajectory[:, 1:], groups=GROUPS, weights=weights)
    torch.testing.assert_close(loss, expected)
    with pytest.raises(
        ValueError, match=r"no block for the span 0-3, only for \['0-2', '0-4', '4-6'\]"
    ):
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
        assert_same_outputs(module(trajectory, progress)["0-6"].loss, expected)
    with pytest.raises(ValueError, match="phase_fraction must lie"):
        ObjectiveArguments(phase_fraction=1.5)

import pytest
import torch

from raptor_hf import RaptorModel
from raptor_hf.losses import (
    BlockPretraining,
    Distillation,
    Span,
    make_span,
    raptor_from_blocks,
    rollout,
    teacher_forcing_weight,
    token_loss,
)
from tests.test_modeling_raptor import randomised

GROUPS = {"cls": slice(0, 1), "registers": slice(1, 3), "patches": slice(3, None)}


@pytest.fixture
def raptor(teacher):
    return randomised(RaptorModel.from_teacher(teacher, [3, 2, 1]))


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


def test_teacher_forcing_fades_over_the_first_quarter():
    assert [teacher_forcing_weight(p) for p in (0, 0.125, 0.25, 0.9)] == [1, 0.5, 0, 0]
    assert teacher_forcing_weight(0.0, fraction=0) == 0


def test_stage_one_mixes_the_two_losses_and_weighs_the_last_block(teacher, trajectory):
    spans = [make_span(teacher, 0, 3), make_span(teacher, 3, 6)]
    for span in spans:
        randomised(span.block)
    losses = BlockPretraining(spans, GROUPS, 6)(trajectory, 0.25)
    weights = {"cls": 0.34, "registers": 0.33, "patches": 0.33}
    for (block, start, stop), group_weights in zip(spans, (None, weights), strict=True):
        forced, free, state = [], [], trajectory[:, start]
        for layer in range(start + 1, stop + 1):
            forced.append(block(trajectory[:, layer - 1], layer))
            state = block(state, layer)
            free.append(state)
        target = trajectory[:, start + 1 : stop + 1]
        expected = sum(
            weight
            * token_loss(torch.stack(states, 1), target, groups=GROUPS, weights=group_weights)
            for weight, states in ((0.25, forced), (0.75, free))
        )
        torch.testing.assert_close(losses[f"{start}-{stop}"], expected)


def test_blocks_of_stage_one_become_a_raptor(teacher, tmp_path, trajectory):
    from safetensors.torch import save_file

    spans = [make_span(teacher, 0, 4), make_span(teacher, 4, 6), make_span(teacher, 0, 2)]
    module = BlockPretraining(spans, GROUPS, 6)
    randomised(module)
    save_file(module.blocks.state_dict(), tmp_path / "blocks.safetensors")
    spans[0].block.attention.config.save_pretrained(tmp_path)
    raptor = raptor_from_blocks(teacher, [4, 2], tmp_path)
    for block, span in zip(raptor.blocks, spans, strict=False):
        for name, weight in span.block.state_dict().items():
            assert torch.equal(block.state_dict()[name], weight)
    loss = Distillation(raptor.blocks, raptor.config.spans(), GROUPS)(trajectory)
    weights = {"cls": 0.45, "registers": 0.10, "patches": 0.45}
    prediction = raptor.rollout(trajectory[:, 0])
    expected = token_loss(prediction[:, 1:], trajectory[:, 1:], groups=GROUPS, weights=weights)
    torch.testing.assert_close(loss, expected)
    with pytest.raises(
        ValueError, match=r"no block for the span 0-3, only for \['0-2', '0-4', '4-6'\]"
    ):
        raptor_from_blocks(teacher, [3, 3], tmp_path)


def test_spans_outside_the_teacher_are_refused(teacher):
    with pytest.raises(ValueError, match="0 ≤ start < stop ≤ 6; got 4-7"):
        make_span(teacher, 4, 7)

"""Students of a study: parts of layers, and their distance from the teacher."""

import math

import pytest
import torch

from evaluation.recurrence.measures import measure_gap
from evaluation.recurrence.students import Student, make_spans, runs_of, shuffled
from raptor_hf.configuration_raptor import token_layout
from raptor_hf.distillation.arguments import ObjectiveArguments
from raptor_hf.distillation.blocks import chain_of
from raptor_hf.distillation.matching import TrajectoryMatching
from raptor_hf.distillation.rollout import rollout
from raptor_hf.teachers import trajectory
from tests.helpers import assert_same_outputs, randomised, tiny_raptor


def test_parts():
    assert runs_of([2, 1]) == ((1, 2), (3,))
    parts = shuffled([3, 3, 6], seed=1)
    assert sorted(map(len, parts)) == [3, 3, 6]
    assert sorted(layer for part in parts for layer in part) == list(range(1, 13))
    assert parts == shuffled([3, 3, 6], seed=1) != shuffled([3, 3, 6], seed=2)
    assert parts[0][0] == 1 and all(list(part) == sorted(part) for part in parts)
    assert Student(runs_of([4, 2])).contiguous and not Student(parts).contiguous


def test_a_shuffled_student_applies_each_block_at_its_own_layers(teacher, pixel_values):
    student = Student(((1, 2, 5), (3, 4, 6)))
    model, spans = make_spans(teacher, student)
    assert [(span.start, span.stop) for span in spans] == [(0, 2), (2, 4), (4, 5), (5, 6)]
    randomised(model.blocks)
    states = trajectory(teacher, pixel_values)
    found, state = rollout(spans, states, resets={0}), states[:, 0]
    for layer, owner in enumerate([0, 0, 1, 1, 0, 1], start=1):
        state = model.blocks[owner](state, torch.tensor([layer]))
        assert_same_outputs(found[:, layer - 1], state)


def test_the_gap_by_hand(teacher, pixel_values):
    states = trajectory(teacher, pixel_values)
    raptor = tiny_raptor(teacher)
    result = measure_gap(chain_of(raptor, None).spans, teacher, states, (8, 8))
    predicted = raptor.rollout(states[:, 0])
    after = states[:, 4]  # layer 4
    absolute = sum(float(image.norm()) for image in predicted[:, 4] - after) / 3
    square = 0.0
    for tokens in (slice(0, 1), slice(1, 3), slice(3, None)):  # cls, registers, patches
        part = after[:, tokens]
        square += float((part - part.mean(dim=(0, 1))).square().sum(dim=(1, 2)).mean())
    assert result["to_spread"][3] == pytest.approx(absolute / math.sqrt(square), rel=1e-5)


def test_the_last_layer_alone_is_learned(teacher, pixel_values):
    raptor, states = tiny_raptor(teacher), trajectory(teacher, pixel_values)
    groups = token_layout(teacher.config).groups()
    chain, objective = chain_of(raptor, None), ObjectiveArguments(objective="autoregressive")
    module = TrajectoryMatching([chain], objective, groups, last_only=True)
    loss, _, _ = module(states, 0.5)["0-6"]
    last = raptor.rollout(states[:, 0])[:, -1]
    assert float(loss) == pytest.approx(float((last - states[:, -1]).square().mean()), rel=1e-5)

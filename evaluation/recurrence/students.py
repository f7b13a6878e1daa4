"""Students of a study: blocks for parts of the layers, contiguous or not."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from raptor_hf import make_raptor
from raptor_hf.configuration_raptor import phase_spans, teacher_family
from raptor_hf.distillation.blocks import chain_of
from raptor_hf.distillation.rollout import Span
from raptor_hf.modeling_raptor import RaptorModel
from raptor_hf.teachers.layers import copy_mean_of_layers, layer_parts

Parts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Student:
    """A student of a teacher with L layers; equal ones, with one seed, are trained once.

    Args:
        parts: for each block, in the order in which they are first applied, the layers (1 … L)
            that it makes.
        seed: of what the training draws.
    """

    parts: Parts
    seed: int = 0

    @property
    def contiguous(self) -> bool:
        """Whether every block makes a run of layers, as a Raptor's do."""
        return self.parts == runs_of([len(part) for part in self.parts])


def runs_of(phases: list[int]) -> Parts:
    """Return the layers 1 … L of consecutive phases: `[2, 1]` to ((1, 2), (3,))."""
    return tuple(tuple(range(start + 1, stop + 1)) for start, stop in phase_spans(phases))


def shuffled(phases: list[int], seed: int) -> Parts:
    """Return parts of the same sizes as some phases, whose layers are drawn at random."""
    order = np.random.default_rng(seed).permutation(sum(phases)) + 1
    parts = [sorted(order[start:stop].tolist()) for start, stop in phase_spans(phases)]
    return tuple(tuple(part) for part in sorted(parts))


def make_spans(teacher: PreTrainedModel, student: Student) -> tuple[RaptorModel, list[Span]]:
    """Make an untrained student: a Raptor, and the spans that its blocks make one after another.

    A block starts as the mean of its layers.
    """
    # consecutive layers: a plain Raptor
    init = "teacher" if student.contiguous else "random"
    model = make_raptor(teacher, [len(part) for part in student.parts], init=init)
    if student.contiguous:
        return model, chain_of(model, None).spans

    # others: each block starts as the mean of its own layers
    layers = teacher.get_submodule(teacher_family(teacher.config).layers)
    for block, part in zip(model.blocks, student.parts, strict=True):
        own = [layers[layer - 1] for layer in part]
        copy_mean_of_layers(block, own, layer_parts(teacher.config))

    # spans: runs of layers of one block
    spans: list[Span] = []
    owner = {layer: b for b, part in enumerate(student.parts) for layer in part}
    for layer in sorted(owner):
        block = model.blocks[owner[layer]]
        if spans and spans[-1].block is block:
            spans[-1] = spans[-1]._replace(stop=layer)
        else:
            spans.append(Span(block, layer - 1, layer))
    return model, spans

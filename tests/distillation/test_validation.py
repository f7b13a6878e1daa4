"""R² of blocks on held-out images while they train."""

import numpy as np
import pytest
import torch

from raptor_hf import make_raptor
from raptor_hf.data import ImageViews, ReadingArguments, load_images, make_processor
from raptor_hf.distillation.arguments import ValidationArguments
from raptor_hf.distillation.blocks import Chain, Span
from raptor_hf.distillation.fidelity import open_validation
from raptor_hf.distillation.rollout import rollout
from raptor_hf.metrics import RSquared, state_statistics
from raptor_hf.teachers import trajectory
from tests.helpers import randomised


@torch.no_grad()
def test_a_chain_starts_from_the_teachers_state(teacher):
    """On the same images as by hand: seven of the digits, drawn with seed 0."""
    block = randomised(make_raptor(teacher, [4, 2])).blocks[0]
    chain, reading = Chain([Span(block, 1, 4)], None), ReadingArguments()
    arguments = ValidationArguments(validation_dataset="digits", validation_images=7)
    processor = make_processor(8)
    validation = open_validation(arguments, teacher, [chain], processor=processor, reading=reading)
    scalars = validation.measure()

    images = ImageViews(load_images("digits", "test"), processor)
    chosen = np.random.default_rng(0).permutation(360)[:7]
    target = trajectory(teacher, images.__getitems__(chosen.tolist())["pixel_values"])[:, 1:5]
    states = rollout([Span(block, 1, 4)], target, resets={1})
    metric = RSquared(keep_in_memory=True)
    groups = {"cls": slice(0, 1), "registers": slice(1, 3), "patches": slice(3, None)}
    whole = torch.cat([target[:, :1], states], 1)
    metric.add_batch(**state_statistics(prediction=whole, target=target, groups=groups))
    assert scalars == {"1-4/r2": pytest.approx(metric.compute()["mean"]["all"], rel=1e-5)}


def test_zero_images_are_all_and_an_interval_needs_a_dataset(teacher):
    options = {"reading": ReadingArguments(), "processor": make_processor(8)}
    assert open_validation(ValidationArguments(), teacher, [], **options) is None
    everything = ValidationArguments(validation_dataset="digits", validation_images=0)
    assert len(open_validation(everything, teacher, [], **options).measure.args[1]) == 360
    with pytest.raises(ValueError, match="--validate_every needs --validation_dataset"):
        open_validation(ValidationArguments(validate_every=5), teacher, [], **options)

"""Values that are not finite reach no weight and end the run; nothing is waited for in a step."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from raptor_hf.activations.online import OnlineActivations
from raptor_hf.configuration_raptor import token_layout
from raptor_hf.distillation.arguments import ObjectiveArguments
from raptor_hf.distillation.blocks import Chain, make_span
from raptor_hf.distillation.matching import TrajectoryMatching, matching_loss
from raptor_hf.loop import StepResult, fit, newest_checkpoint
from raptor_hf.loop.arguments import LoopArguments
from tests.helpers import arguments, compute_loss, noisy_network


def train_blocks(teacher, images, folder, *, break_at=None, **changes):
    """Two blocks on the states 1 … 5; before one step a weight becomes NaN."""
    spans = [make_span(teacher, 1, 3, init="random"), make_span(teacher, 3, 5, init="random")]
    groups = token_layout(teacher.config).groups()
    module = TrajectoryMatching([Chain([s], None) for s in spans], ObjectiveArguments(), groups)
    activations = OnlineActivations(teacher, images, layers=module.layers)
    loss = matching_loss(activations)

    def broken(wrapped, batch, progress):
        if progress == break_at:
            with torch.no_grad():
                spans[1].block.layer_scale2[0] = math.nan
        return loss(wrapped, batch, progress)

    settings = {"output_dir": str(folder), "steps": 8, "batch_size": 4, "report_to": "none"}
    settings |= {"checkpoint_every": 3, "warmup_steps": 1}
    return fit(module, activations, broken, LoopArguments(**settings | changes))


def test_the_error_names_step_and_images(teacher, images, tmp_path):
    message = (
        r"not finite at step 4 \(images \d, \d, \d, \d\).*another --output_dir with a smaller "
        r"--learning_rate.*newest checkpoint here is step_00000003"
    )
    with pytest.raises(FloatingPointError, match=message):
        train_blocks(teacher, images, tmp_path, break_at=4 / 8)
    assert newest_checkpoint(tmp_path).name == "step_00000003"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_no_weight_is_reached(teacher, data, tmp_path, optimizer, broken):
    module = make_span(teacher, 0, 3, init="teacher").block
    module._no_split_modules = ["RaptorBlock"]
    states = torch.randn(8, 7, 24, generator=torch.Generator().manual_seed(0))
    before = []

    def loss_of(module, batch, progress):
        loss = module(states, torch.tensor([1])).square().mean()
        if progress == 7 / 12:
            before.append({name: w.clone() for name, w in module.state_dict().items()})
            # the square root of 0 has the value 0 and no slope
            zero = (0 * next(module.parameters())).sum().sqrt()
            loss = loss * math.nan if broken == "loss" else loss + zero
        return StepResult(loss)

    # noticed after step 10, before the checkpoint; the steps in between change nothing
    settings = arguments(tmp_path, optimizer=optimizer, weight_decay=0.1, log_every=0)
    with pytest.raises(FloatingPointError, match="not finite at step 7 .images unknown"):
        fit(module, data, loss_of, settings)
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, before[0][name]), name
    assert newest_checkpoint(tmp_path).name == "step_00000005"


def test_nothing_is_read_from_the_device_within_a_step(data, tmp_path):
    """On a GPU every such number would be waited for; `tests/test_gpu.py` looks there."""
    reads, steps = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._local_scalar_dense.default and steps:
                reads.append(steps[-1])
            return function(*args, **(kwargs or {}))

    def counted(module, batch, progress):
        steps.append(round(progress * 12))
        return StepResult(compute_loss(module, batch, progress).loss)

    with Watch():
        settings = {"log_every": 0, "checkpoint_every": 0}
        fit(noisy_network(), data, counted, arguments(tmp_path, **settings))
    assert reads and set(reads) == {11}  # to log the last step

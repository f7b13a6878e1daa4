"""What goes wrong in training is said in words."""

import copy
import logging
import math
import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from raptor_hf.activations.online import OnlineActivations
from raptor_hf.configuration_raptor import token_layout
from raptor_hf.distillation.blocks import Chain, make_span
from raptor_hf.distillation.matching import TrajectoryMatching, matching_explanation, matching_loss
from raptor_hf.distillation.objective import ObjectiveArguments
from raptor_hf.loop.arguments import ComputeArguments, LoopArguments
from raptor_hf.loop.checkpoints import newest_checkpoint
from raptor_hf.loop.engine import Engine
from raptor_hf.loop.fit import fit
from raptor_hf.loop.guards import DivergenceGuard
from raptor_hf.loop.numbers import StepNumbers, StepResult
from tests.helpers import (
    arguments,
    assert_same_outputs,
    compute_loss,
    noisy_network,
)


def test_losses_that_grow_tenfold_are_warned_of_once(caplog):
    guard = DivergenceGuard()
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0)).mul(0.3).exp().tolist()
    for step, factor in enumerate(noise):
        guard.check(factor * 0.99**step, step)  # falling, and noisy
    assert not caplog.records
    for step in range(400, 500):
        guard.check(0.02 * 1.1 ** (step - 400), step)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "The loss diverges: it has grown from" in record.getMessage()
    assert "smaller --learning_rate" in record.getMessage()
    for step in range(500, 800):
        guard.check(0.02, step)  # it recovers, and diverges again
    guard.check(1e6, 800)
    assert len(caplog.records) == 2


def train_blocks(teacher, images, folder, *, break_at=None, weight=math.nan):
    """Two blocks on the states 1 … 5; from one step on one of their weights is another."""
    spans = [make_span(teacher, 1, 3, init="random"), make_span(teacher, 3, 5, init="random")]
    groups = token_layout(teacher.config).groups()
    module = TrajectoryMatching([Chain([s], None) for s in spans], ObjectiveArguments(), groups)
    activations = OnlineActivations(teacher, images, layers=module.layers)
    loss = matching_loss(activations)

    def broken(wrapped, batch, progress):
        if progress == break_at:
            with torch.no_grad():
                spans[1].block.layer_scale2[0] = weight
        return loss(wrapped, batch, progress)

    settings = {"output_dir": str(folder), "steps": 8, "batch_size": 4, "report_to": "none"}
    settings |= {"checkpoint_every": 3, "warmup_steps": 1}
    return fit(
        module, activations, broken, LoopArguments(**settings),
        explain=matching_explanation(activations),
    )  # fmt: skip


def test_a_loss_that_is_not_a_number_is_told_with_layer_and_images(teacher, images, tmp_path):
    message = (
        r"loss is nan at step 4: the rollout of 3-5 is not finite from layer 4 on "
        r"\(images \d, \d, \d, \d\).*smaller --learning_rate"
    )
    with pytest.raises(FloatingPointError, match=message):
        train_blocks(teacher, images, tmp_path, break_at=4 / 8)
    assert newest_checkpoint(tmp_path).name == "step_00000003"


def test_a_teacher_whose_states_are_not_finite_is_told_apart(teacher, images, tmp_path):
    with torch.no_grad():
        teacher.encoder.layer[1].layer_scale2.lambda1[0] = math.inf
    with pytest.raises(
        FloatingPointError, match="step 0: the teacher's state after layer 2 is not"
    ):
        train_blocks(teacher, images, tmp_path)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_numbers_that_are_not_finite_reach_no_weight(teacher, tmp_path, optimizer):
    settings = {"optimizer": optimizer, "warmup_steps": 0, "weight_decay": 0.1}
    module = make_span(teacher, 0, 3, init="teacher").block
    module._no_split_modules = ["RaptorBlock"]
    engine = Engine(module, arguments(tmp_path, **settings))
    states = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0))

    def update(factor):
        learn = engine.learner(lambda model, x, _: StepResult(model(x, 1).square().mean() * factor))
        loss = learn(states, 0.0, 1.0).loss
        before = copy.deepcopy(module.state_dict())
        left_out = engine.update(loss)
        same = [torch.equal(w, before[name]) for name, w in module.state_dict().items()]
        assert all(weight.isfinite().all() for weight in module.parameters())
        return bool(left_out), all(same), any(same)

    assert update(1.0) == (False, False, False)
    assert update(math.nan) == (True, True, True)
    for weight in module.parameters():  # the loss is finite, and a gradient is not
        weight.register_hook(lambda gradient: gradient * math.inf)
        break
    assert update(1.0) == (True, True, True)


def test_a_gradient_that_is_not_finite_is_told(data, tmp_path):
    def broken(module, batch, progress):
        result = compute_loss(module, batch, progress)
        if progress >= 7 / 12:  # the square root of 0 has no slope
            zero = (0 * module[0].weight).sum().sqrt()
            return StepResult(result.loss + zero)
        return result

    with pytest.raises(FloatingPointError, match="gradient is not finite at step 7 "):
        fit(noisy_network(), data, broken, arguments(tmp_path, log_every=0))
    assert newest_checkpoint(tmp_path).name == "step_00000005"


def test_nothing_is_read_from_the_device_within_a_step(data, tmp_path, monkeypatch):
    """On a GPU every such number would be waited for; `tests/test_gpu.py` looks there."""
    reads, settled = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._local_scalar_dense.default:
                reads.append(traceback.format_stack())
            return function(*args, **(kwargs or {}))

    read = StepNumbers.read
    monkeypatch.setattr(StepNumbers, "read", lambda n: (settled.append(steps[-1]), read(n))[1])
    steps = []

    def counted(module, batch, progress):
        steps.append(round(progress * 12))
        return StepResult(compute_loss(module, batch, progress).loss)

    with Watch():
        settings = {"log_every": 0, "checkpoint_every": 0}
        fit(noisy_network(), data, counted, arguments(tmp_path, **settings))
    assert settled == [*range(1, 12), 11]  # each a step later, and the last at the end
    in_steps = [stack for stack in reads if any("engine.py" in frame for frame in stack)]
    assert not in_steps, in_steps[0]


def test_too_little_memory_says_which_knobs_there_are(data, tmp_path):
    def hungry(module, batch, progress):
        torch.empty(2**60)
        return compute_loss(module, batch, progress)

    with pytest.raises(MemoryError, match="with 8 images at a time.*--per_device_batch_size 4"):
        fit(noisy_network(), data, hungry, arguments(tmp_path))

    def wrong(module, batch, progress):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        fit(noisy_network(), data, wrong, arguments(tmp_path))


class Operations(TorchDispatchMode):
    """Notes down all operations that are called."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(str(operation))
        return operation(*args, **(kwargs or {}))

    def number(self, word):
        return sum(word in name for name in self.names)


def test_gradient_checkpointing_changes_no_gradient_and_keeps_less(teacher, pixel_values):
    states = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(2))
    gradients, kept, again = [], [], []
    for options in (
        {},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "keep_attention": True},
    ):
        torch.manual_seed(0)
        compute = ComputeArguments(**options)
        block = make_span(teacher, 0, 3, init="teacher", compute=compute).block.train()
        sizes = []

        def count(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            state = states
            for depth in (1, 2, 3):
                state = block(state, torch.tensor([depth]))
        loss = state.square().mean()
        with Operations() as counted:
            loss.backward()
        again.append(counted.number("scaled_dot_product"))
        gradients.append([weight.grad for weight in block.parameters()])
        kept.append(sum(sizes))
    for plain, *checkpointed in zip(*gradients, strict=True):
        assert_same_outputs(checkpointed, [plain, plain])
    assert kept[1] < kept[0] / 10
    assert again == [3, 6, 3]  # backward passes alone; a forward of each, too; kept


@pytest.mark.parametrize(
    "options", [{}, {"gradient_checkpointing": True, "attn_implementation": "eager"}]
)
def test_only_what_is_one_operation_can_be_kept(options):
    with pytest.raises(ValueError, match="--keep_attention"):
        ComputeArguments(keep_attention=True, **options)

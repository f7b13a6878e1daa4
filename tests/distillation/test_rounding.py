"""Matrices of few bits: by hand, beside onnxruntime's packing, through a training and a file."""

import copy
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from safetensors.torch import load_file
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from raptor_hf import RaptorModel, make_raptor
from raptor_hf.activations.store import load_activations
from raptor_hf.activations.writing import write_activations
from raptor_hf.data import ImageViews, load_images, make_processor
from raptor_hf.distillation.arguments import ObjectiveArguments
from raptor_hf.distillation.blocks import chain_of
from raptor_hf.distillation.matching import TrajectoryMatching
from raptor_hf.distillation.rounding import (
    RoundedLinear,
    gptq,
    keep_rounded,
    record_inputs,
    round_products,
    round_weight,
    unpack_weight,
)
from raptor_hf.distillation.training import round_chains, train_chains
from raptor_hf.loop.arguments import LoopArguments
from tests.helpers import SIZES, tiny_teacher
from tests.programs import TWO_PROCESSES, run

WIDE = {**SIZES, "hidden_size": 32, "num_attention_heads": 4}  # groups have 32 inputs


def weights(outputs=16, inputs=96, scale=0.3):
    return scale * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def activations(tmp_path):
    """A teacher of 32 channels, and its states of twelve digits."""
    torch.manual_seed(0)
    teacher = Dinov2Model(Dinov2Config(**WIDE)).eval().requires_grad_(False)
    images = ImageViews(load_images("digits", "train"), make_processor(8), image_ids=range(12))
    (tmp_path / "states").mkdir()
    write_activations(teacher, images, tmp_path / "states", dtype="float32")
    return teacher, load_activations(tmp_path / "states")


def test_a_group_is_rounded_by_hand():
    """The largest magnitude, −2, becomes −2³ quarters; 1.9 is more than 7 of them."""
    weight = torch.zeros(1, 64)
    weight[0, :5] = torch.tensor([0.3, -0.4, -2.0, 1.9, 1.1])
    weight[0, 32:34] = torch.tensor([4.0, -3.9])  # the next: the scale takes the sign
    integers, scales = round_weight(weight, 4)
    assert scales.tolist() == [[0.25, -0.5]] and scales.dtype == torch.float16
    assert integers[0, 0, :6].tolist() == [1, -2, -8, 7, 4, 0]
    assert integers[0, 1, :3].tolist() == [-8, 7, 0]
    assert unpack_weight(integers, scales)[0, :5].tolist() == [0.25, -0.5, -2.0, 1.75, 1.0]


@pytest.mark.parametrize("bits", range(2, 9))
def test_rounded_weights_round_to_themselves(bits):
    """Of all sizes that float16 can hold as a scale, or cannot; and of zeros."""
    for scale in (0.3, 1e-3, 1e-5, 1e-7, 0.0):
        rounded = unpack_weight(*round_weight(weights(scale=scale), bits))
        integers, scales = round_weight(rounded, bits)
        assert torch.equal(unpack_weight(integers, scales), rounded)
        if scale == 0.3:
            assert integers.min() == -(2 ** (bits - 1)) and integers.max() == 2 ** (bits - 1) - 1
            worst = (rounded - weights()).abs().unflatten(1, (-1, 32)).amax(dim=2)
            assert (worst <= 1.01 * scales.abs()).all()  # one step, at the end that is cut off


@pytest.mark.parametrize("bits", [4, 8])
def test_onnxruntime_packs_rounded_weights_without_loss(bits):
    """Its own quantiser finds the same integers and scales."""
    integers, scales = round_weight(weights(), bits)
    rounded = unpack_weight(integers, scales)
    matrix = numpy_helper.from_array(rounded.T.contiguous().numpy(), "weight")
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])
        for name, size in (("x", rounded.shape[1]), ("y", rounded.shape[0]))
    ]
    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    graph = helper.make_graph([node], "product", values[:1], values[1:], [matrix])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    quantizer = MatMulNBitsQuantizer(model, bits=bits, block_size=32, is_symmetric=True)
    quantizer.process()
    found = {part.name: numpy_helper.to_array(part) for part in quantizer.model.graph().initializer}
    packed, found_scales = found[f"weight_Q{bits}"], found["weight_scales"]
    if bits == 4:  # two in a byte, the first one low
        packed = np.stack([packed & 15, packed >> 4], axis=-1)
    expected = integers.numpy().astype(int) + 2 ** (bits - 1)
    assert (packed.reshape(expected.shape) == expected).all()
    assert (found_scales.reshape(scales.shape) == scales.float().numpy()).all()
    onnx.checker.check_model(model)


def least_squares(weight, squares, bits):
    """GPTQ by its definition: the columns left make up for a rounded one as well as they can."""
    left, squares = weight.double().clone(), squares.double()
    squares = squares + 0.01 * squares.diagonal().mean() * torch.eye(len(squares))
    scales, half = round_weight(weight, bits)[1].double(), 2 ** (bits - 1)
    largest = weight.abs().unflatten(1, (-1, 32)).argmax(dim=2)
    order = squares.diagonal().argsort(descending=True).tolist()
    for i in order[:]:
        order.remove(i)
        integers = (left[:, i] / scales[:, i // 32]).round().clamp(-half, half - 1)
        integers = torch.where(largest[:, i // 32] == i % 32, -half, integers)
        error = left[:, i] - integers * scales[:, i // 32]
        left[:, i] -= error
        behind = torch.linalg.solve(squares[order][:, order], squares[order, i])
        left[:, order] += torch.outer(error, behind)
    return left.float()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_columns_make_up_for_each_other(bits):
    """As in a least-squares solution, and inputs that have nothing in common leave the nearest."""
    torch.manual_seed(0)
    layer, inputs = nn.Linear(96, 40), torch.randn(2, 300, 8) @ torch.randn(8, 96)
    inputs += 0.1 * torch.randn(2, 300, 96)
    with record_inputs([layer]) as squares:
        for part in inputs:
            layer(part)
    assert not layer._forward_pre_hooks
    rows = inputs.flatten(0, 1)
    assert torch.allclose(squares[layer], rows.T @ rows, rtol=1e-4)

    weight, nearest = layer.weight.detach(), unpack_weight(*round_weight(layer.weight, bits))
    found = gptq(layer.weight, squares[layer], bits)
    assert torch.allclose(found, least_squares(weight, squares[layer], bits), atol=1e-5)
    assert torch.equal(unpack_weight(*round_weight(found, bits)), found)
    errors = [(rows @ (rounded - weight).T).norm() for rounded in (found, nearest)]
    assert errors[0] < 0.5 * errors[1]
    assert torch.equal(gptq(layer.weight, 7 * torch.eye(96), bits), nearest)


def test_gradients_pass_straight_through():
    layer, plain = nn.Linear(64, 8), nn.Linear(64, 8)
    with torch.no_grad():
        plain.weight.copy_(unpack_weight(*round_weight(layer.weight, 3)))
        plain.bias.copy_(layer.bias)
    round_products(layer, 3)
    inputs = torch.randn(5, 64)
    for module in (layer, plain):
        module(inputs).square().sum().backward()
    assert type(layer) is RoundedLinear
    assert torch.equal(layer(inputs), plain(inputs))
    assert torch.equal(layer.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_rounds_each_matrix_once(activations, monkeypatch, checkpointing):
    """However often its block is applied; states and gradients are those of plain weights."""
    teacher, source = activations
    calls, gradients, original = [], [], RoundedLinear.round
    monkeypatch.setattr(RoundedLinear, "round", lambda self: calls.append(1) or original(self))
    states = source.__getitems__([0, 1])["states"]
    start = make_raptor(teacher, [4, 2])
    for bits in (3, None):
        model = copy.deepcopy(start)
        if bits is None:
            round_products(model.blocks, 3)
            keep_rounded(model.blocks)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        arguments = ObjectiveArguments(objective="autoregressive", phase_fraction=0, quantize=bits)
        module = TrajectoryMatching([chain_of(model, None)], arguments, source.layout.groups())
        loss, _, _ = module.train()(states, 0.5)["0-6"]
        if bits:
            assert len(calls) == 2 * 4  # of two blocks four matrices each
        loss.backward()
        parts = [parameter.grad.flatten() for parameter in model.blocks.parameters()]
        gradients.append(torch.cat(parts))
    rounded, plain = gradients
    assert (rounded - plain).norm() < 1e-5 * plain.norm()


def test_a_step_makes_the_states_of_the_weights_that_are_kept(activations):
    """Bit for bit."""
    teacher, source = activations
    model, groups = make_raptor(teacher, [4, 2]), source.layout.groups()
    states = source.__getitems__([0, 1])["states"]
    arguments = ObjectiveArguments(objective="autoregressive", quantize=3)
    module = TrajectoryMatching([chain_of(model, None)], arguments, groups)
    found = module(states, 0.75)["0-6"][1]
    before = model.blocks[0].ffn.fc1.weight.clone()
    keep_rounded(model.blocks)
    assert torch.equal(found, model.rollout(states[:, 0])[:, 1:])
    assert type(model.blocks[0].ffn.fc1) is nn.Linear
    assert not torch.equal(model.blocks[0].ffn.fc1.weight, before)


def train(activations, folder, bits=4, **options):
    """A Raptor, and the states that its blocks made in the last step's training mode."""
    teacher, source = activations
    torch.manual_seed(0)
    model = make_raptor(teacher, [4, 2], init="teacher")
    objective = ObjectiveArguments(objective="autoregressive", quantize=bits)
    options = {"steps": 6, "batch_size": 4, "warmup_steps": 1, "report_to": "none", **options}
    options |= {"optimizer": "muon", "learning_rate": 1e-2}
    loop = LoopArguments(output_dir=str(folder), **options)
    train_chains([chain_of(model, None)], teacher, source, objective, loop)
    return model


def test_what_learned_is_what_is_saved(activations, tmp_path):
    """The forward pass of rounded blocks is that of the packed weights to the last bit."""
    model = train(activations, tmp_path / "run")
    states = torch.randn(2, 5, 32)
    model.save_pretrained(tmp_path / "saved")
    loaded = RaptorModel.from_pretrained(tmp_path / "saved")
    assert loaded.config.weight_bits == 4 and loaded.dtype == torch.float32
    packed = {}
    for name, layer in loaded.blocks.named_modules():
        if type(layer) is nn.Linear:
            packed[name] = round_weight(layer.weight, 4)
            assert torch.equal(unpack_weight(*packed[name]), layer.weight)
    assert len(packed) == 8
    expected = loaded.rollout(states)
    round_products(model.blocks, 4)
    assert torch.equal(model.rollout(states), expected)


def test_a_resumed_run_is_the_same(activations, tmp_path, monkeypatch):
    expected = train(activations, tmp_path / "whole").state_dict()
    read, calls = type(activations[1]).__getitems__, []

    def fail_at_last(self, rows):
        calls.append(rows)
        if len(calls) == 5:
            raise OSError("the disk is gone")
        return read(self, rows)

    monkeypatch.setattr(type(activations[1]), "__getitems__", fail_at_last)
    with pytest.raises(OSError, match="the disk is gone"):
        train(activations, tmp_path / "parts", checkpoint_every=2)
    monkeypatch.undo()
    found = train(activations, tmp_path / "parts", checkpoint_every=2).state_dict()
    plain = train(activations, tmp_path / "plain", bits=None)
    assert plain.config.weight_bits is None
    for name, weight in expected.items():
        assert torch.equal(weight, found[name]), name
    assert not torch.equal(plain.blocks[0].ffn.fc1.weight, expected["blocks.0.ffn.fc1.weight"])


def test_rollouts_change_less_than_by_rounding_to_the_nearest(activations):
    teacher, source = activations
    torch.manual_seed(0)
    model = make_raptor(teacher, [4, 2])
    states = source.__getitems__(list(range(12)))["states"]
    expected, nearest = model.rollout(states[:, 0]), copy.deepcopy(model)
    round_products(nearest.blocks, 3)
    keep_rounded(nearest.blocks)
    round_chains([chain_of(model, None)], source, 3)
    errors = [(m.rollout(states[:, 0]) - expected).norm() for m in (model, nearest)]
    assert errors[0] < 0.7 * errors[1]
    model.blocks[0].layer_scale1.data[:] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        round_chains([chain_of(model, None)], source, 3)


ROUND = """
import sys
import torch
from safetensors.torch import save_file
from raptor_hf import make_raptor
from raptor_hf.activations.store import load_activations
from raptor_hf.distillation.blocks import chain_of
from raptor_hf.distillation.training import round_chains
from raptor_hf.runs.processes import process_state
from raptor_hf.teachers import load_backbone

teacher, source = load_backbone(f"{sys.argv[1]}/teacher"), load_activations(f"{sys.argv[1]}/states")
torch.manual_seed(0)
model = make_raptor(teacher, [4, 2])
round_chains([chain_of(model, None)], source, 3)
if process_state().is_main_process:
    number = process_state().num_processes
    save_file(model.blocks.state_dict(), f"{sys.argv[1]}/{number}.safetensors")
"""


def test_two_processes_round_as_one_does(activations, tmp_path):
    """Though the second one has nothing of twelve images."""
    activations[0].save_pretrained(tmp_path / "teacher")
    script = tmp_path / "round.py"
    script.write_text(ROUND)
    run(sys.executable, script, tmp_path, OMP_NUM_THREADS="1")
    run(*TWO_PROCESSES, script, tmp_path)
    one, two = (load_file(tmp_path / f"{number}.safetensors") for number in (1, 2))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-5, atol=1e-8)


def test_what_can_not_be_rounded_is_refused():
    with pytest.raises(ValueError, match="groups of 32"):
        round_products(make_raptor(tiny_teacher(), [4, 2]).blocks, 4)
    for bits in (0, 1, 16):
        with pytest.raises(ValueError, match="2 to 8 bits"):
            ObjectiveArguments(quantize=bits)
    with pytest.raises(ValueError, match="give it as --blocks, and --phase_fraction 0"):
        ObjectiveArguments(quantize=4, phase_fraction=0.5)

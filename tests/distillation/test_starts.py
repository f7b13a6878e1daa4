import copy
import functools

import pytest
import torch

from raptor_hf import make_raptor
from raptor_hf.activations.store import load_activations
from raptor_hf.activations.writing import write_activations
from raptor_hf.distillation.starts import _align, new_raptor
from raptor_hf.teachers.layers import LayerParts, teacher_layer_weights


def error_of(model, activations):
    states = activations.__getitems__(range(len(activations)))["states"].float()
    with torch.no_grad():
        return float((model.rollout(states[:, 0]) - states).square().mean())


def shuffle_layer(layer, num_heads, seed):
    """Put the heads and hidden units of a layer in another order: the same function."""
    generator = torch.Generator().manual_seed(seed)
    attention, mlp = layer.attention, layer.mlp
    size = attention.o_proj.weight.shape[0]
    heads = torch.randperm(num_heads, generator=generator)
    channels = torch.arange(size).view(num_heads, -1)[heads].flatten()
    units = torch.randperm(mlp.fc1.out_features, generator=generator)
    with torch.no_grad():
        for part in (attention.q_proj, attention.k_proj, attention.v_proj):
            part.weight.copy_(part.weight[channels])
            part.bias.copy_(part.bias[channels])
        attention.o_proj.weight.copy_(attention.o_proj.weight[:, channels])
        mlp.fc1.weight.copy_(mlp.fc1.weight[units])
        mlp.fc1.bias.copy_(mlp.fc1.bias[units])
        mlp.fc2.weight.copy_(mlp.fc2.weight[:, units])


@pytest.fixture
def shuffled_teacher(teacher):
    """A teacher whose layers 1-4 are one layer in four orders, and 5-6 another in two."""
    for number, source in enumerate((0, 0, 0, 0, 5, 5)):
        layer = teacher.encoder.layer[number]
        layer.load_state_dict(copy.deepcopy(teacher.encoder.layer[source].state_dict()))
    for number in (0, 2, 3, 4):
        shuffle_layer(teacher.encoder.layer[number], teacher.config.num_attention_heads, number)
    return teacher


def test_aligned_layers_are_found_again(shuffled_teacher, images, tmp_path):
    """Where averaging fails, the aligned start is the teacher itself: no worse than any other."""
    write_activations(shuffled_teacher, images, tmp_path, dtype="float32")
    activations = load_activations(tmp_path)
    errors = {}
    for init in ("aligned", "teacher", "random"):
        model = new_raptor(shuffled_teacher, [4, 2], init=init)
        for block in model.blocks:  # depth scales of exactly 1
            for weight in block.depth_scaling.fc2.parameters():
                torch.nn.init.zeros_(weight)
        errors[init] = error_of(model, activations)
    assert errors["aligned"] < 1e-9 < errors["teacher"] / 1000
    assert errors["aligned"] < errors["random"]


def test_one_layer_is_aligned_with_itself(teacher):
    plain, aligned = (new_raptor(teacher, [1] * 6, init=init) for init in ("teacher", "aligned"))
    weights = aligned.state_dict()
    for name, weight in plain.state_dict().items():
        assert "depth_scaling" in name or torch.equal(weight, weights[name])


@pytest.mark.parametrize("use_swiglu_ffn", [False, True])
def test_alignment_keeps_the_function(teacher, use_swiglu_ffn):
    """A layer aligned with another one computes what it did."""
    config = copy.deepcopy(teacher.config)
    config.use_swiglu_ffn = use_swiglu_ffn
    teacher = type(teacher)(config).eval()
    ffn = {"ffn": "swiglu" if use_swiglu_ffn else "gelu"}
    weights_of = functools.partial(teacher_layer_weights, parts=LayerParts())
    ffn["intermediate_size"] = weights_of(teacher.encoder.layer[0])["ffn.fc2.weight"].shape[1]
    model = make_raptor(teacher, [1] * 6, init="teacher", **ffn)
    like = weights_of(teacher.encoder.layer[4])
    states = torch.randn(2, 7, config.hidden_size)
    with torch.no_grad():
        block = model.blocks[1]
        before = block(states, 2)
        weights = weights_of(teacher.encoder.layer[1])
        moved = _align(weights, like, config.num_attention_heads, gated=use_swiglu_ffn)
        assert not torch.equal(moved["ffn.fc1.weight"], weights["ffn.fc1.weight"])
        block.load_state_dict(moved, strict=False)
        torch.testing.assert_close(block(states, 2), before, atol=1e-5, rtol=1e-5)

import copy
import math

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, silu
from transformers import Dinov2Config, Dinov2Model

from raptor_hf import (
    RaptorBlock,
    RaptorConfig,
    RaptorForImageClassification,
    make_raptor,
)
from tests.helpers import SIZES, assert_same_outputs, randomised


def reference_block(w, x, depth, heads, gated):
    """One application, written out from the equations (paper, App. A.3), without this package."""
    d = x.shape[-1]
    hidden = silu(w["depth_scaling.fc1.weight"][:, 0] * depth + w["depth_scaling.fc1.bias"])
    s = w["depth_scaling.fc2.weight"] @ hidden + w["depth_scaling.fc2.bias"] + 1
    y = layer_norm(x, (d,), w["norm1.weight"], w["norm1.bias"], 1e-6)
    q, k, v = (y @ w["attention.qkv.weight"].T + w["attention.qkv.bias"]).split(d, dim=-1)
    mixed = [
        torch.softmax(q[..., h] @ k[..., h].transpose(1, 2) / math.sqrt(d // heads), -1) @ v[..., h]
        for h in (slice(i * d // heads, (i + 1) * d // heads) for i in range(heads))
    ]
    y = torch.cat(mixed, -1) @ w["attention.proj.weight"].T + w["attention.proj.bias"]
    x = x + s[:d] * w["layer_scale1"] * y
    y = layer_norm(x, (d,), w["norm2.weight"], w["norm2.bias"], 1e-6)
    y = y @ w["ffn.fc1.weight"].T + w["ffn.fc1.bias"]
    y = silu(y[..., : y.shape[-1] // 2]) * y[..., y.shape[-1] // 2 :] if gated else gelu(y)
    x = x + s[d : 2 * d] * w["layer_scale2"] * (y @ w["ffn.fc2.weight"].T + w["ffn.fc2.bias"])
    return s[2 * d :] * x


@pytest.mark.parametrize("ffn", ["gelu", "swiglu"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_block_equals_an_independent_reference(teacher, ffn, attention):
    config = RaptorConfig(teacher_config=teacher.config, phases=[6], ffn=ffn)
    config._attn_implementation = attention
    block = randomised(RaptorBlock(config))
    states = torch.randn(2, 7, 24)
    for depth in (1, 6):
        expected = reference_block(block.state_dict(), states, depth, 3, ffn == "swiglu")
        found = block(states, torch.tensor([depth]))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_block_from_the_teacher_is_the_mean_of_its_phase(teacher):
    raptor = make_raptor(teacher, [4, 2], init="teacher")
    layers = teacher.encoder.layer[4:6]
    query = torch.stack([layer.attention.q_proj.weight for layer in layers]).mean(0)
    assert torch.equal(raptor.blocks[1].attention.qkv.weight[:24], query)
    scale = torch.stack([layer.layer_scale2.lambda1 for layer in layers]).mean(0)
    assert torch.equal(raptor.blocks[1].layer_scale2, scale)


@pytest.mark.parametrize("activation", ["relu", "quick_gelu"])
def test_blocks_have_the_activation_of_the_teacher(activation, pixel_values):
    teacher = Dinov2Model(Dinov2Config(**SIZES, hidden_act=activation)).eval()
    raptor = make_raptor(teacher, [1] * 6, init="teacher", depth_scaling=False)
    assert raptor.config.ffn == activation
    assert_same_outputs(raptor(pixel_values)[0], teacher(pixel_values)[0], 1e-5)


def test_a_teacher_that_computes_something_else_is_refused(teacher):
    """Wherever its family's row in the table is not what a model does, it is no teacher."""
    other = copy.deepcopy(teacher)
    other.encoder.layer[0].mlp.activation_fn = torch.nn.ReLU()
    with pytest.raises(ValueError, match="a copy of the first layer of this .* does not know"):
        make_raptor(other, [4, 2], init="teacher")
    forward = teacher.encoder.forward  # as if there were a norm before the layers
    teacher.encoder.forward = lambda states, **options: forward(2 * states, **options)
    with pytest.raises(ValueError, match="the embeddings of this .* does not know of a 'dinov2"):
        make_raptor(teacher, [4, 2])


def test_the_teachers_embeddings_stay_in_evaluation_mode(teacher):
    raptor = make_raptor(teacher.train(), [4, 2]).train()
    assert raptor.training and raptor.blocks[0].training and not raptor.shell.training


def test_forward_is_embed_advance_norm(teacher, pixel_values):
    raptor = randomised(make_raptor(teacher, [4, 2]))
    outputs = raptor(pixel_values, output_hidden_states=True)
    states = raptor.embed(pixel_values)
    for depth in range(1, 7):
        states = raptor.advance(states, depth)
        assert_same_outputs(outputs.hidden_states[depth], states)
        block = raptor.blocks[0 if depth <= 4 else 1]
        assert_same_outputs(states, block(outputs.hidden_states[depth - 1], torch.tensor([depth])))
    assert_same_outputs(outputs.last_hidden_state, raptor.norm(states))
    assert_same_outputs(
        raptor.rollout(outputs.hidden_states[2], start=2, stop=5),
        torch.stack(outputs.hidden_states[2:6], dim=1),
    )
    assert raptor(pixel_values).hidden_states is None
    with pytest.raises(ValueError, match="0 ≤ start ≤ stop ≤ 6; got start=3, stop=7"):
        raptor.rollout(states, start=3, stop=7)


def test_only_the_blocks_train(teacher):
    raptor = make_raptor(teacher, [4, 2])
    trained = {name for name, weight in raptor.named_parameters() if weight.requires_grad}
    assert trained == {name for name, _ in raptor.named_parameters() if name.startswith("blocks.")}


def test_depth_scaling_starts_as_the_identity(teacher):
    scaling = make_raptor(teacher, [6]).blocks[0].depth_scaling
    for scale in scaling(torch.tensor([[3.0]])):
        assert 0 < (scale - 1).abs().max() < 0.01
    assert -1 < scaling.fc1.bias.min() < -0.3 < 0.3 < scaling.fc1.bias.max() < 1
    assert 0.8e-4 < scaling.fc2.weight.std() < 1.2e-4


def test_classifier_reads_cls_and_the_mean_of_the_patches(teacher, pixel_values):
    config = RaptorConfig(teacher_config=teacher.config, phases=[4, 2], num_labels=5)
    model = randomised(RaptorForImageClassification(config))
    states = model.raptor(pixel_values).last_hidden_state
    features = torch.cat([states[:, 0], states[:, 3:].mean(1)], dim=1)  # 1, 2 are registers
    outputs = model(pixel_values, labels=torch.tensor([0, 4, 2]))
    expected = features @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(outputs.logits, expected)
    loss = torch.nn.functional.cross_entropy(expected, torch.tensor([0, 4, 2]))
    torch.testing.assert_close(outputs.loss, loss)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": "mean"}, "init must be 'teacher' or 'random'; got 'mean'"),
        ({"ffn": "swiglu"}, "init='teacher' needs blocks like the teacher's layers"),
        ({"block_norm_eps": 0.1}, "block_norm_eps=0.1 contradicts init='teacher'"),
    ],
)
def test_make_raptor_refuses_arguments_that_do_not_fit(teacher, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_raptor(teacher, **({"phases": [6]} | arguments))


def test_depth_scaling_keeps_its_precision_under_autocast(teacher):
    scaling = make_raptor(teacher, [6]).blocks[0].depth_scaling
    depth = torch.tensor([[3.0]])
    with torch.autocast("cpu", torch.bfloat16):
        found = scaling(depth.bfloat16())
    for scale, expected in zip(found, scaling(depth), strict=True):
        assert_same_outputs(scale, expected)
        assert (scale != 1).any()

"""The common checks that transformers makes of its own vision models, written for the Raptors.

Exports are in test_export.py, backbones in test_backbone.py, pipelines in test_remote_code.py and
test_dense_models.py, tools in test_tools.py.

Not applicable: tokens, vocabularies, tied weights, caches and generation (no text model), masks and
inputs_embeds (no padding among patches), chunked feed-forward and head masks (not offered), tensor
parallelism (no plan). Not run for want of a GPU: flash attention, several devices, fp16 kernels.

The mixins of transformers 5.23 themselves, run on the five classes: 107 pass, 68 are skipped (GPUs,
parallelism, text), 15 fail: get_set_embeddings (1) wants an `nn.Embedding`; reverse_loading_mapping
(5) wants renamed keys of layers, and the shell has none; training with gradient checkpointing (9)
wants a gradient of the teacher's mask token, which no image needs.
"""

import copy
import inspect
import json

import pytest
import torch

from raptor_hf import RaptorModel
from raptor_hf.modeling_raptor_heads import AUTO_CLASSES
from raptor_hf.teachers import load_backbone
from tests.helpers import assert_same_outputs, make, tensors

EVERY_MODEL = pytest.mark.parametrize("model_class", AUTO_CLASSES.values())


def assert_same_weights(ours, theirs):
    """The same weights, bit for bit."""
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert list(ours) == list(theirs)
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


@EVERY_MODEL
def test_save_and_load(model_class, teacher, pixel_values, tmp_path):
    model = make(model_class, teacher)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    model.save_pretrained(tmp_path / "other_process", is_main_process=False)
    assert not list(tmp_path.glob("other_process/*"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert not [*tmp_path.glob("*.bin"), *tmp_path.glob("*.pt")]
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    assert_same_weights(loaded, model)
    assert_same_outputs(loaded(pixel_values), model(pixel_values))
    assert_same_outputs(copy.deepcopy(loaded)(pixel_values), model(pixel_values))


@EVERY_MODEL
def test_dtypes(model_class, teacher, pixel_values, tmp_path):
    make(model_class, teacher).to(torch.bfloat16).save_pretrained(tmp_path)
    half = model_class.from_pretrained(tmp_path)  # as it was saved
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    outputs = tensors(half(pixel_values))
    whole = tensors(model_class.from_pretrained(tmp_path, dtype=torch.float32)(pixel_values))
    for name, tensor in whole.items():
        assert (tensor.dtype, outputs[name].dtype) == (torch.float32, torch.bfloat16)
        error = (tensor - outputs[name]).square().mean().sqrt() / tensor.square().mean().sqrt()
        assert error < 0.05, name  # eight bits, six applications


def test_missing_weights_are_initialised(teacher, tmp_path):
    model = make(RaptorModel, teacher, layerscale_value=0.25)
    lost = ("layer_scale1", "norm1.", "depth_scaling.fc1.bias", "ffn.fc1.")
    kept = {k: v for k, v in model.state_dict().items() if not any(part in k for part in lost)}
    model.save_pretrained(tmp_path, state_dict=kept)
    loaded, info = RaptorModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == set(model.state_dict()) - set(kept)
    for name, weight in loaded.state_dict().items():
        if name in kept:  # also beside a lost weight of the same module
            assert torch.equal(weight, kept[name]), name
    block = loaded.blocks[1]
    assert torch.equal(block.layer_scale1, torch.full((24,), 0.25))
    assert torch.equal(block.norm1.weight, torch.ones(24))
    assert torch.equal(block.ffn.fc1.bias, torch.zeros(96))
    assert 0.01 < block.ffn.fc1.weight.std() < 0.03
    assert -1 <= block.depth_scaling.fc1.bias.min() < block.depth_scaling.fc1.bias.max() <= 1


@EVERY_MODEL
def test_backbone_and_heads_share_weights(model_class, teacher, pixel_values, tmp_path):
    backbone, model = make(RaptorModel, teacher), make(model_class, teacher)
    backbone.save_pretrained(tmp_path / "backbone")
    model.save_pretrained(tmp_path / "model")
    loaded, info = model_class.from_pretrained(tmp_path / "backbone", output_loading_info=True)
    assert info["missing_keys"] == {k for k in model.state_dict() if k.startswith("classifier.")}
    assert_same_weights(loaded.base_model, backbone)
    assert_same_outputs(loaded.base_model(pixel_values), backbone(pixel_values))
    back, info = RaptorModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values()), info
    assert_same_weights(back, model.base_model)
    assert_same_outputs(back(pixel_values), model.base_model(pixel_values))


@EVERY_MODEL
def test_hidden_states(model_class, teacher, pixel_values):
    model = make(model_class, teacher)
    assert model(pixel_values).hidden_states is None
    outputs = model(pixel_values, output_hidden_states=True)
    assert [tuple(state.shape) for state in outputs.hidden_states] == 7 * [(3, 7, 24)]
    for state in outputs.hidden_states[1:]:
        state.retain_grad()
    last = [tensor for name, tensor in tensors(outputs).items() if "hidden_states" not in name][0]
    last.sum().backward()
    assert all(state.grad.abs().max() > 0 for state in outputs.hidden_states[1:])
    assert_same_outputs(model.trajectory(pixel_values), torch.stack(outputs.hidden_states, 1))
    model.config.output_hidden_states = True
    assert model(pixel_values, output_hidden_states=False).hidden_states is None
    assert len(model(pixel_values).hidden_states) == 7


@EVERY_MODEL
def test_hidden_states_of_some_layers(model_class, teacher, pixel_values):
    """As transformers has it: the others are None, negative ones count from the end."""
    model = make(model_class, teacher)
    everything = model(pixel_values, output_hidden_states=True).hidden_states
    for layers, kept in (([0, 3, -1], {0, 3, 6}), (-2, {5}), (0, {0}), ([7, -8, 2], {2})):
        found = model(pixel_values, output_hidden_states=layers).hidden_states
        assert {layer for layer, state in enumerate(found) if state is not None} == kept
        for layer in kept:
            assert_same_outputs(found[layer], everything[layer])
    assert model(pixel_values, output_hidden_states=[]).hidden_states is None


@EVERY_MODEL
def test_attentions(model_class, teacher, pixel_values):
    model = make(model_class, teacher)
    assert model(pixel_values).attentions is None
    outputs = model(pixel_values, output_attentions=True, output_hidden_states=True)
    assert [tuple(weights.shape) for weights in outputs.attentions] == 6 * [(3, 3, 7, 7)]
    for weights in outputs.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 3, 7))
    block, states = model.base_model.blocks[1], outputs.hidden_states[5]  # makes layer 6
    qkv = block.attention.qkv(block.norm1(states)).unflatten(-1, (3, 3, 8))
    expected = torch.einsum("bqhd,bkhd->bhqk", qkv[:, :, 0], qkv[:, :, 1]) / 8**0.5
    torch.testing.assert_close(outputs.attentions[5], expected.softmax(-1))
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    again = model(pixel_values, output_hidden_states=True)
    assert_same_outputs(tensors(again), tensors(outputs), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_implementations_agree(teacher, pixel_values, dtype):
    model = make(RaptorModel, teacher).to(dtype).requires_grad_(False)
    states = {}
    for implementation in ("eager", "sdpa", "flex_attention"):
        model.set_attn_implementation(implementation)
        assert model.blocks[0].attention.config._attn_implementation == implementation
        states[implementation] = model(pixel_values).last_hidden_state
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for other in ("sdpa", "flex_attention"):
        torch.testing.assert_close(states[other], states["eager"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("use_reentrant", [False, True])
@EVERY_MODEL
def test_gradient_checkpointing(model_class, teacher, pixel_values, use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = make(model_class, teacher).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            assert all(block.gradient_checkpointing for block in model.base_model.blocks)
        outputs = model(pixel_values)
        first = [t for name, t in tensors(outputs).items() if "hidden_states" not in name][0]
        first.square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if "blocks." in n})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
    assert_same_outputs(gradients[1], gradients[0])


@EVERY_MODEL
def test_what_transformers_asks_for(model_class, teacher):
    model = make(model_class, teacher)
    assert isinstance(model.get_input_embeddings(), torch.nn.Module)
    assert model.get_input_embeddings() is model.base_model.shell.embeddings.patch_embeddings
    assert list(inspect.signature(model.forward).parameters)[0] == model.main_input_name
    assert {"RaptorBlock", "Dinov2WithRegistersEmbeddings"} <= model._no_split_modules


@EVERY_MODEL
def test_compiles_without_a_break(model_class, teacher, pixel_values):
    torch.compiler.reset()
    model = make(model_class, teacher).requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for options in ({}, {"output_attentions": True}):
        expected = tensors(model(pixel_values, **options))
        assert_same_outputs(tensors(compiled(pixel_values, **options)), expected)


def test_weights_come_from_safetensors_only(teacher, tmp_path):
    model = make(RaptorModel, teacher)
    model.save_pretrained(tmp_path)
    index = {"metadata": {}, "weight_map": {name: "weights.bin" for name in model.state_dict()}}
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(model.state_dict(), tmp_path / "weights.bin")
    with pytest.raises(ValueError, match="never a pickle; got .*weights.bin"):
        RaptorModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must lie in safetensors .*weights.bin"):
        load_backbone(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="no file named model.safetensors"):
        RaptorModel.from_pretrained(tmp_path, use_safetensors=False)

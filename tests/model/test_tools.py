"""Hooks, adapters, pruning, tracing and other tools find a Raptor as they find its teacher."""

import copy

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune

from raptor_hf import (
    RaptorForDepthEstimation,
    RaptorForImageClassification,
    RaptorForSemanticSegmentation,
    RaptorModel,
    make_raptor,
    raptorize,
)
from raptor_hf.configuration_raptor import TEACHER_FAMILIES
from raptor_hf.modeling_raptor_heads import AUTO_CLASSES
from tests.families import PIXELS, tiny_model
from tests.helpers import assert_same_outputs, make, tensors

EVERY_FAMILY = pytest.mark.parametrize("family", TEACHER_FAMILIES)
EVERY_MODEL = pytest.mark.parametrize("model_class", AUTO_CLASSES.values())


@pytest.mark.parametrize("case", ["dinov2", "dinov2, gated", "dinov3_vit", "internvl_vision"])
@torch.no_grad()
def test_hooks_see_every_linear_layer_as_it_computes(case):
    """As often as blocks are applied, with outputs that nobody changes afterwards."""
    raptor = make_raptor(tiny_model(case), [2, 1]).eval()
    seen = {}

    def record(name):
        return lambda module, args, output: seen.setdefault(name, []).append((args[0], output))

    layers = {n: m for n, m in raptor.blocks.named_modules() if isinstance(m, nn.Linear)}
    for name, layer in layers.items():
        layer.register_forward_hook(record(name))
    raptor(PIXELS)
    assert len(layers) == 2 * 4
    for name, layer in layers.items():
        assert len(seen[name]) == (2 if name.startswith("0.") else 1)
        for states, output in seen[name]:
            assert torch.equal(output, nn.functional.linear(states, layer.weight, layer.bias))


@torch.no_grad()
def test_a_hook_may_give_a_tensor_of_its_own():
    raptor = make_raptor(tiny_model("dinov2"), [2, 1]).eval()
    patch = torch.randn(2, 17, 96)
    kept = patch.clone()
    fc1 = raptor.blocks[0].ffn.fc1
    handle = fc1.register_forward_hook(lambda *_: patch)
    assert torch.equal(raptor(PIXELS)[0], raptor(PIXELS)[0]) and torch.equal(patch, kept)
    handle.remove()
    handle = register_module_forward_hook(lambda module, *_: patch if module is fc1 else None)
    assert torch.equal(raptor(PIXELS)[0], raptor(PIXELS)[0]) and torch.equal(patch, kept)
    handle.remove()
    fc1.forward = lambda _: patch
    assert torch.equal(raptor(PIXELS)[0], raptor(PIXELS)[0]) and torch.equal(patch, kept)


@pytest.mark.parametrize(
    "model_class",
    [RaptorForImageClassification, RaptorForSemanticSegmentation, RaptorForDepthEstimation],
)
@torch.no_grad()
def test_heads_are_called(model_class, teacher, pixel_values):
    model, called = make(model_class, teacher), []
    model.classifier.register_forward_hook(lambda *_: called.append(1))
    expected = model(pixel_values)[0]
    assert called == [1]
    torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})(pixel_values)
    model.classifier = nn.Sequential(model.classifier)  # as an adapter wraps it
    assert torch.equal(model(pixel_values)[0], expected)


@pytest.mark.parametrize("case", ["dinov2", "dinov3_vit"])
def test_pruned_layers_train(case):
    raptor = make_raptor(tiny_model(case), [2, 1]).train()
    for module in raptor.blocks.modules():
        if isinstance(module, nn.Linear):
            prune.l1_unstructured(module, "weight", 0.5)
    for _ in range(2):
        raptor(PIXELS)[0].sum().backward()
    qkv = raptor.blocks[0].attention.qkv
    assert torch.equal(qkv.weight, qkv.weight_orig * qkv.weight_mask)


@EVERY_FAMILY
@torch.no_grad()
def test_images_are_converted_to_the_dtype_of_the_weights(family):
    raptor = make_raptor(tiny_model(family), [2, 1]).eval().bfloat16()
    found = raptor(PIXELS).last_hidden_state
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, raptor(PIXELS.bfloat16()).last_hidden_state)


def test_a_model_of_a_half_precision_teacher_has_one_dtype(tmp_path):
    tiny_model("dinov2").bfloat16().save_pretrained(tmp_path)
    teacher = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model = RaptorModel(make_raptor(teacher, [2, 1]).config)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    model(PIXELS)


@EVERY_FAMILY
def test_the_patch_embedding_is_found(family):
    raptor = make_raptor(tiny_model(family), [2, 1]).train()
    assert isinstance(raptor.get_input_embeddings(), nn.Module)
    raptor.gradient_checkpointing_enable({"use_reentrant": True})
    raptor.enable_input_require_grads()
    raptor(PIXELS)[0].sum().backward()
    assert all(weight.grad is not None for weight in raptor.blocks.parameters())


@EVERY_FAMILY
def test_any_attention_can_be_asked_for_at_loading(family, tmp_path):
    make_raptor(tiny_model(family), [2, 1]).save_pretrained(tmp_path)
    loaded = RaptorModel.from_pretrained(tmp_path, attn_implementation="flex_attention")
    assert loaded.blocks[0].attention.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize("family", ["dinov2", "vit", "dinov3_vit", "clip_vision_model", "radio"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traces(family):
    raptor = make_raptor(tiny_model(family), [2, 1]).eval().requires_grad_(False)
    traced = torch.jit.trace(raptor, PIXELS, strict=False)
    assert_same_outputs(traced(PIXELS)["last_hidden_state"], raptor(PIXELS).last_hidden_state)


@EVERY_MODEL
def test_interpolation_may_be_asked_for(model_class, teacher):
    images = torch.randn(1, 3, 12, 16)
    model = make(model_class, teacher)
    assert_same_outputs(
        tensors(model(images, interpolate_pos_encoding=True)), tensors(model(images))
    )


def test_patches_may_be_masked(teacher, pixel_values):
    teacher.embeddings.mask_token.fill_(1.0)
    mask = torch.tensor([[True, False, False, True]]).expand(len(pixel_values), 4)
    options = {"output_hidden_states": True, "bool_masked_pos": mask}
    found = make_raptor(teacher, [4, 2])(pixel_values, **options).hidden_states[0]
    assert torch.equal(found, teacher(pixel_values, **options).hidden_states[0])
    assert not torch.equal(found, teacher(pixel_values, output_hidden_states=True).hidden_states[0])


def test_phases_and_depths_of_numpy(teacher, pixel_values, tmp_path):
    raptor = make_raptor(teacher, np.array([4, 2]))
    raptor.save_pretrained(tmp_path)
    assert RaptorModel.from_pretrained(tmp_path).config.phases == [4, 2]
    states = raptor.embed(pixel_values)
    assert torch.equal(raptor.advance(states, np.int64(5)), raptor.advance(states, 5))


def test_maps_of_a_backbone_are_kept():
    config = copy.deepcopy(tiny_model("dinov2").config)
    config.out_indices, config.apply_layernorm, config.reshape_hidden_states = [1, 3], False, False
    config = make_raptor(transformers.Dinov2Backbone(config).eval(), [2, 1]).config
    found = (list(config.out_indices), config.apply_layernorm, config.reshape_hidden_states)
    assert found == ([1, 3], False, False)


def _set(name, value):
    def change(raptor):
        setattr(raptor.config, name, value)
        raptor(torch.zeros(1, 3, 8, 8))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("num_applications", 0), "num_applications must lie in 1 … 6"),
        (_set("phases", [2, 4]), r"made for phases=\[4, 2\]; the configuration has \[2, 4\]"),
        (_set("image_size", 32), "image_size is its teacher's, and can't be set"),
        (_set("num_hidden_layers", 2), "num_hidden_layers is its teacher's"),
    ],
)
def test_wrong_values_that_are_set_later_are_refused(teacher, change, message):
    with pytest.raises(ValueError, match=message):
        change(make(RaptorModel, teacher))


def test_teachers_without_layers_of_their_own_are_refused(teacher):
    vit = raptorize(tiny_model("vit"), [2, 1])
    with pytest.raises(ValueError, match="with its own 3 layers; .* a RaptorTrunk of 3"):
        make_raptor(vit, [2, 1])
    teacher.encoder.layer = teacher.encoder.layer[:2]  # the configuration still says 6
    with pytest.raises(ValueError, match="with its own 6 layers; .* a ModuleList of 2"):
        make_raptor(teacher, [4, 2], init="random")


def test_losses_at_their_edges(teacher, pixel_values):
    segmenter = make(RaptorForSemanticSegmentation, teacher, num_labels=3)
    nothing = segmenter(pixel_values, labels=torch.full((3, 8, 8), 255)).loss
    assert nothing == 0.0 and nothing.requires_grad
    depth, metres = make(RaptorForDepthEstimation, teacher), torch.full((3, 8, 8), 2)
    whole, real = (depth(pixel_values, labels=m).loss for m in (metres, metres.float()))
    assert whole == real


@torch.no_grad()
def test_new_weights_count_at_once(teacher, pixel_values):
    first, second = make(RaptorModel, teacher), make(RaptorModel, teacher)
    for weight in second.parameters():
        weight += 0.1
    first(pixel_values)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(pixel_values)[0], second(pixel_values)[0])

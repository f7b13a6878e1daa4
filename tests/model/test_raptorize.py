"""Models of transformers with a trunk in place of their layers keep everything else."""

import copy
import json
import warnings

import pytest
import torch
import transformers
from torch import nn
from transformers import SwinConfig, SwinModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from raptor_hf import RaptorBackbone, load_raptorized, make_raptor, raptorize, save_raptorized
from raptor_hf.modeling_raptor import RaptorAttention
from raptor_hf.teachers.loading import find_tower
from raptor_hf.teachers.trunks import RaptorTrunk
from tests.families import HOSTS, PIXELS, tensors_of, tiny_model
from tests.helpers import assert_same_outputs, randomised

EVERY_HOST = pytest.mark.parametrize("host", HOSTS)


def copied(model):
    """A Raptor of the tower within a model, with a block a layer, each a copy of it."""
    tower = find_tower(model)
    raptor = make_raptor(tower, [1] * tower.config.num_hidden_layers, depth_scaling=False)
    raptor.set_attn_implementation("sdpa")
    return raptor


def trunk_of(model):
    [trunk] = [module for module in model.modules() if isinstance(module, RaptorTrunk)]
    return trunk


@EVERY_HOST
@torch.no_grad()
def test_with_copied_blocks_a_model_gives_what_it_gave(host):
    model, inputs = HOSTS[host]()
    expected = tensors_of(model(**inputs, output_hidden_states=True))
    kind, config = type(model), model.config.to_dict()
    assert raptorize(model, blocks=copied(model)) is model
    assert type(model) is kind and model.config.to_dict() == config
    found = tensors_of(model(**inputs, output_hidden_states=True))
    assert found.keys() == expected.keys()
    assert_same_outputs(found, expected, 1e-5)


@EVERY_HOST
@torch.no_grad()
def test_saved_it_loads_as_it_was(host, tmp_path):
    model, inputs = HOSTS[host]()
    raptorize(model, [2, 1])
    randomised(trunk_of(model).blocks)
    expected = tensors_of(model(**inputs, output_hidden_states=True))
    save_raptorized(model, tmp_path)
    loaded = load_raptorized(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    assert_same_outputs(tensors_of(loaded(**inputs, output_hidden_states=True)), expected, 1e-5)


@torch.no_grad()
def test_a_saved_folder_is_no_model_of_transformers(tmp_path):
    """Its classes would put random layers where the blocks were."""
    home = tmp_path / "home"
    tiny_model("vit").save_pretrained(home)
    model = raptorize(transformers.AutoModel.from_pretrained(home), [2, 1])
    with pytest.raises(ValueError, match="Save it with raptor_hf.save_raptorized"):
        model.save_pretrained(tmp_path / "saved")
    save_raptorized(model, tmp_path / "saved")
    for model_class in (transformers.ViTModel, transformers.AutoModel):
        with pytest.raises((OSError, ValueError)):
            model_class.from_pretrained(tmp_path / "saved")
    files = ("raptorized.json", "raptorized.safetensors")  # safetensors writes for its owner alone
    assert len({(tmp_path / "saved" / file).stat().st_mode for file in files}) == 1
    description = (tmp_path / "saved" / "raptorized.json").read_text(encoding="utf-8")
    assert json.loads(description)["raptor"]["phases"] == [2, 1]
    assert str(home) not in description


@torch.no_grad()
def test_two_models_of_one_configuration_keep_their_own_phases(tmp_path):
    config = tiny_model("vit").config
    first, second = (transformers.ViTModel(config).eval() for _ in range(2))
    raptorize(first, [2, 1])
    raptorize(second, [1, 2])
    save_raptorized(first, tmp_path)
    loaded = load_raptorized(tmp_path)
    assert trunk_of(loaded).config.phases == [2, 1]
    assert_same_outputs(loaded(PIXELS).last_hidden_state, first(PIXELS).last_hidden_state)


@torch.no_grad()
def test_a_language_model_goes_on_generating(tmp_path):
    model, inputs = HOSTS["Llava"]()
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**inputs, **options)
    raptorize(model, blocks=copied(model))
    assert torch.equal(model.generate(**inputs, **options), expected)
    save_raptorized(model, tmp_path)
    assert torch.equal(load_raptorized(tmp_path).generate(**inputs, **options), expected)


@pytest.mark.parametrize("host", ["ViTForImageClassification", "CLIPModel"])
@torch.no_grad()
def test_the_attention_is_the_towers_also_when_it_changes(host):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return sdpa_attention_forward(*args, **kwargs)

    transformers.AttentionInterface.register("counted", counted)
    model, inputs = HOSTS[host]()
    raptor = copied(model)
    raptorize(model, blocks=raptor)
    model.set_attn_implementation("counted")
    for counting in (model, copy.deepcopy(model)):
        calls.clear()
        counting(**inputs)
        assert sum(isinstance(args[0], RaptorAttention) for args in calls) == 3
    assert raptor.config._attn_implementation == "sdpa"


def test_gradients_reach_every_block_also_with_checkpoints():
    model, inputs = HOSTS["ViTForImageClassification"]()
    raptorize(model.requires_grad_(True), [2, 1]).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**inputs).logits.square().sum().backward()
        blocks = trunk_of(model).blocks
        gradients.append({name: weight.grad for name, weight in blocks.named_parameters()})
        assert all(gradient is not None for gradient in gradients[-1].values())
    assert_same_outputs(*gradients, 1e-4)


def test_a_frozen_tower_stays_frozen():
    model, _ = HOSTS["CLIPModel"]()
    model.requires_grad_(False).text_model.requires_grad_(True)
    raptorize(model, [2, 1])
    assert not any(weight.requires_grad for weight in model.vision_model.parameters())


@torch.no_grad()
def test_a_block_is_looked_up_when_it_is_called():
    """Blocks that were replaced or wrapped, and those of copies, are used."""
    model, inputs = HOSTS["ViTForImageClassification"]()
    raptorize(model, [2, 1])
    expected = model(**inputs).logits
    other = copy.deepcopy(model)
    randomised(trunk_of(other).blocks)
    assert not torch.allclose(other(**inputs).logits, expected)
    assert torch.equal(model(**inputs).logits, expected)
    wrapped = trunk_of(model).blocks[0]
    called = []

    class Wrapper(nn.Module):
        def forward(self, *args):
            called.append(int(args[1]))
            return wrapped(*args)

    trunk_of(model).blocks[0] = Wrapper()
    assert torch.equal(model(**inputs).logits, expected) and called == [1, 2]


@torch.no_grad()
def test_a_slice_of_a_trunk_has_its_weights():
    model, inputs = HOSTS["ViTForImageClassification"]()
    states = raptorize(model, [2, 1])(**inputs, output_hidden_states=True).hidden_states
    model.vit.layers = model.vit.layers[:2]  # the usual way to cut a ViT short
    assert len(model.vit.layers) == 2 and any("blocks.0" in name for name in model.state_dict())
    short = model(**inputs, output_hidden_states=True).hidden_states
    assert_same_outputs(short[1], states[1])
    with pytest.raises(ValueError, match="Of the trunk's 3 layers 2 are left"):
        save_raptorized(model, "nowhere")


def clip_blocks(**changes):
    return make_raptor(tiny_model("clip_vision_model", **changes), [2, 1])


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (lambda: tiny_model("clip_vision_model"), "must be a Raptor .*; got a CLIPVisionModel"),
        (lambda: make_raptor(tiny_model("vit"), [2, 1]), "for model_type=vit; the tower has clip"),
        (lambda: clip_blocks(hidden_size=48), "made for hidden_size=48; the tower has 24"),
        (lambda: clip_blocks(patch_size=8), "made for patch_size=8; the tower has 4"),
        (lambda: clip_blocks(layer_norm_eps=1e-6), "layer_norm_eps=1e-06; the tower has 1e-05"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(blocks, message):
    model, _ = HOSTS["CLIPModel"]()
    with pytest.raises(ValueError, match=message):
        raptorize(model, blocks=blocks())


def test_models_that_blocks_cannot_go_into_are_refused():
    model, _ = HOSTS["CLIPModel"]()
    with pytest.raises(ValueError, match="phases must be .* sum to the teacher's 3 layers"):
        raptorize(model, [7, 3, 2])
    with pytest.raises(ValueError, match="Give either phases, such as"):
        raptorize(model)
    with pytest.raises(ValueError, match="has 0 trunks"):
        save_raptorized(model, "nowhere")
    for other in (
        SwinModel(SwinConfig(depths=[1], num_heads=[2], embed_dim=16)),
        clip_blocks(),
        RaptorBackbone(clip_blocks().config),
    ):
        with pytest.raises(ValueError, match="must have one vision tower .* dinov2, .* it has .."):
            raptorize(other, [1])
    # of two towers one is given
    model.second = transformers.CLIPVisionModel(model.config.vision_config)
    with pytest.raises(ValueError, match=r"it has \['vision_model', 'second'\]. Of several"):
        raptorize(model, [2, 1])
    raptorize(model.second, [2, 1])
    assert isinstance(model.second.encoder.layers, RaptorTrunk)
    with pytest.raises(ValueError, match="with its own 3 layers; .* a RaptorTrunk of 3"):
        raptorize(model.second, [2, 1])


def test_blocks_of_another_teacher_are_told_by_their_embeddings():
    raptor = make_raptor(tiny_model("vit"), [2, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        raptorize(tiny_model("vit"), blocks=raptor)
        raptorize(tiny_model("vit").bfloat16(), blocks=raptor)  # rounded, and the same
    tuned = tiny_model("vit")
    tuned.embeddings.cls_token *= 1.25
    with pytest.warns(UserWarning, match=r"1 weights around .*cls_token"):
        raptorize(tuned, blocks=raptor)

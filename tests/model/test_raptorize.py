"""Models of transformers with a trunk in place of their layers stay what they are."""

import copy
import pickle
import warnings

import pytest
import torch
import transformers
from transformers import (
    AutoBackbone,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForZeroShotImageClassification,
    SwinConfig,
    SwinModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from raptor_hf import RaptorBackbone, make_raptor, raptorize
from raptor_hf.distillation.starts import new_raptor
from raptor_hf.modeling_raptor import RaptorAttention
from raptor_hf.modeling_raptorized import RaptorTrunk
from raptor_hf.teachers.loading import find_towers
from tests.families import CASES, HOSTS, PIXELS, tensors_of, tiny_model
from tests.helpers import assert_same_outputs, randomised

EVERY_HOST = pytest.mark.parametrize("host", HOSTS)


def copied(model):
    """A Raptor of the tower within a model, with a block a layer, each a copy of it."""
    [tower] = find_towers(model).values()
    phases = [1] * tower.config.num_hidden_layers
    raptor = make_raptor(tower, phases, init="teacher", depth_scaling=False)
    raptor.set_attn_implementation("sdpa")
    return raptor


@EVERY_HOST
@torch.no_grad()
def test_with_copied_blocks_a_model_gives_what_it_gave(host):
    model, inputs = HOSTS[host]()
    expected = tensors_of(model(**inputs, output_hidden_states=True))
    kind = type(model)
    assert raptorize(model, blocks=copied(model)) is model
    assert isinstance(model, kind) and type(model).__name__ == kind.__name__
    found = tensors_of(model(**inputs, output_hidden_states=True))
    assert found.keys() == expected.keys()
    assert_same_outputs(found, expected, 1e-5)
    assert sum(isinstance(module, RaptorTrunk) for module in model.modules()) == 1


@EVERY_HOST
@torch.no_grad()
def test_saved_it_loads_as_the_class_that_it_was(host, tmp_path):
    model, inputs = HOSTS[host]()
    raptorize(model, [2, 1])
    [trunk] = [module for module in model.modules() if isinstance(module, RaptorTrunk)]
    randomised(trunk.blocks)
    expected = tensors_of(model(**inputs, output_hidden_states=True))
    before = str(model.config.to_dict())
    model.save_pretrained(tmp_path)
    assert str(model.config.to_dict()) == before
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(loaded).__name__ == type(model).__name__ and not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    assert_same_outputs(tensors_of(loaded(**inputs, output_hidden_states=True)), expected, 1e-5)


@torch.no_grad()
def test_a_saved_model_says_what_it_is(tmp_path):
    model, _ = HOSTS["CLIPModel"]()
    layers = sum(w.numel() for w in model.vision_model.encoder.layers.parameters())
    raptorize(model, [2, 1]).save_pretrained(tmp_path)
    blocks = sum(w.numel() for w in model.vision_model.encoder.layers.parameters())
    assert model.config.raptorized.layer_parameters == layers > blocks
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "# A CLIPModel with 2 blocks for 3 layers" in card
    assert f"\n{blocks / 1e6:.3g} M parameters in place of {layers / 1e6:.3g} M." in card
    assert "AutoModelForZeroShotImageClassification.from_pretrained" in card
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@torch.no_grad()
def test_the_right_auto_class_loads_it(tmp_path):
    for host, auto_class in (
        ("CLIPModel", AutoModelForZeroShotImageClassification),
        ("ViTForImageClassification", AutoModelForImageClassification),
        ("Llava", AutoModelForImageTextToText),
        ("DINOv3ViTBackbone", AutoBackbone),
    ):
        model, _ = HOSTS[host]()
        raptorize(model, [2, 1]).save_pretrained(tmp_path / host)
        saved = transformers.AutoConfig.from_pretrained(tmp_path / host)
        assert auto_class.__name__ in saved.auto_map
        card = (tmp_path / host / "README.md").read_text(encoding="utf-8")
        assert f"model = {auto_class.__name__}.from_pretrained(" in card
        if auto_class is not AutoBackbone:  # it asks the Hub, even for a folder
            loaded = auto_class.from_pretrained(tmp_path / host)
            assert type(loaded).__name__ == type(model).__name__


@torch.no_grad()
def test_what_loading_overrides_is_the_models(tmp_path):
    model, inputs = HOSTS["ViTForImageClassification"]()
    model.config.id2label = {0: "ant", 1: "bee", 2: "cat", 3: "dog"}
    raptorize(model, [2, 1]).save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).id2label == model.config.id2label
    load = AutoModelForImageClassification.from_pretrained
    other = {"num_labels": 7, "output_hidden_states": True, "hidden_dropout_prob": 0.25}
    for loaded in (
        load(tmp_path, ignore_mismatched_sizes=True, **other),
        load(
            tmp_path,
            ignore_mismatched_sizes=True,
            config=transformers.AutoConfig.from_pretrained(tmp_path, **other),
        ),
    ):
        assert loaded.classifier.out_features == loaded.config.num_labels == 7
        assert loaded.config.hidden_dropout_prob == 0.25
        assert len(loaded(**inputs).hidden_states) == 4
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.num_labels, config.output_hidden_states = 5, True
    fresh = AutoModelForImageClassification.from_config(config)
    assert fresh.classifier.out_features == 5 and fresh.config.output_hidden_states
    config, unused = transformers.AutoConfig.from_pretrained(
        tmp_path, return_unused_kwargs=True, num_labels=7, colour="red"
    )
    assert config.num_labels == 7 and unused == {"colour": "red"}


@pytest.mark.parametrize("host", [name for name in HOSTS if name != "Llava"])  # its text's own
@torch.no_grad()
def test_attentions_are_refused_rather_than_left_out(host):
    model, inputs = HOSTS[host]()
    raptorize(model, [2, 1])
    with pytest.raises(ValueError, match="attentions of blocks within a .* are not recorded"):
        model(**inputs, output_attentions=True)
    model(**inputs)


@torch.no_grad()
def test_a_language_model_goes_on_generating():
    model, inputs = HOSTS["Llava"]()
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    raptorize(model, blocks=copied(model))
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_every_family_takes_a_trunk(case):
    model = tiny_model(case)
    raptor = copied(model)
    raptor.set_attn_implementation("eager")
    noise = {"noise": torch.arange(16.0).expand(2, 16)} if case == "vit_mae" else {}
    expected = tensors_of(model(PIXELS, output_hidden_states=True, **noise))
    raptorize(model, blocks=raptor)
    assert_same_outputs(
        tensors_of(model(PIXELS, output_hidden_states=True, **noise)), expected, 1e-5
    )


@pytest.mark.parametrize("host", ["ViTForImageClassification", "CLIPModel"])
@torch.no_grad()
def test_the_attention_is_the_towers_also_when_it_changes(host, tmp_path):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return sdpa_attention_forward(*args, **kwargs)

    transformers.AttentionInterface.register("counted", counted)
    model, inputs = HOSTS[host]()
    raptor = copied(model)
    raptorize(model, blocks=raptor)
    model.save_pretrained(tmp_path)
    model(**inputs)
    assert not calls
    model.set_attn_implementation("counted")
    for counting in (
        model,
        copy.deepcopy(model),
        transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="counted"),
    ):
        calls.clear()
        counting(**inputs)
        blocks = {id(args[0]) for args in calls if isinstance(args[0], RaptorAttention)}
        assert len(blocks) == 3
    assert raptor.config._attn_implementation == "sdpa"
    assert model.config.raptorized.raptor is not raptor.config


def test_gradients_reach_every_block_also_with_checkpoints():
    model, inputs = HOSTS["ViTForImageClassification"]()
    raptorize(model, [2, 1]).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**inputs).logits.square().sum().backward()
        blocks = [m for m in model.modules() if isinstance(m, RaptorTrunk)][0].blocks
        gradients.append({name: weight.grad for name, weight in blocks.named_parameters()})
        assert all(gradient is not None for gradient in gradients[-1].values())
    assert_same_outputs(*gradients, 1e-4)


def test_a_copy_has_its_own_blocks():
    model, inputs = HOSTS["CLIPModel"]()
    raptorize(model, [2, 1])
    other = copy.deepcopy(model)
    [trunk] = [module for module in other.modules() if isinstance(module, RaptorTrunk)]
    randomised(trunk.blocks)
    assert trunk[0].block is trunk.blocks[0] and trunk[2].block is trunk.blocks[1]
    ours, theirs = (m(**inputs).logits_per_image for m in (model, other))
    assert not torch.allclose(ours, theirs)


@torch.no_grad()
def test_a_pickled_model_is_the_same():
    model, inputs = HOSTS["CLIPModel"]()
    raptorize(model, [2, 1])
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)
    assert type(again.vision_model.encoder.layers[0]) is type(model.vision_model.encoder.layers[0])
    assert torch.equal(again(**inputs).logits_per_image, model(**inputs).logits_per_image)


def test_hooks_stay_on_the_layers_until_they_are_removed():
    model, inputs = HOSTS["ViTForImageClassification"]()
    layers, said = model.vit.layers, []
    handles = [
        layers[1].register_forward_hook(
            lambda layer, args, kwargs, out: said.append("after"), with_kwargs=True
        ),
        layers[1].register_forward_pre_hook(
            lambda layer, args, kwargs: said.append("before"), with_kwargs=True
        ),
    ]
    raptorize(model, [2, 1])
    said.clear()  # what `raptorize` checked
    model(**inputs)
    assert said == ["before", "after"]
    for handle in handles:
        handle.remove()
    model(**inputs)
    assert said == ["before", "after"]


def test_what_does_not_fit_is_refused_in_words():
    model, _ = HOSTS["CLIPModel"]()
    with pytest.raises(ValueError, match="phases must be .* sum to the teacher's 3 layers"):
        raptorize(model, [7, 3, 2])
    with pytest.raises(ValueError, match="Give phases, such as"):
        raptorize(model)
    with pytest.raises(ValueError, match="'text_model' is no vision tower .*'vision_model'"):
        raptorize(model, [2, 1], tower="text_model")
    with pytest.raises(ValueError, match="SwinModel has no vision tower .* are dinov2, "):
        raptorize(SwinModel(SwinConfig(depths=[1], num_heads=[2], embed_dim=16)), [1])
    for case, changes, words in (
        ("vit", {}, "family clip_vision_model, .* family vit"),
        ("clip_vision_model", {"hidden_size": 48}, "has channels 24; .* for channels 48"),
        ("clip_vision_model", {"num_attention_heads": 2}, "has heads 3; .* for heads 2"),
        ("clip_vision_model", {"patch_size": 8}, "patches of 4×4 pixels, .* of 8×8 pixels"),
        ("clip_vision_model", {"image_size": 24}, "has patches 16; .* for patches 36"),
        ("clip_vision_model", {"layer_norm_eps": 1e-6}, "has eps 1e-05; .* for eps 1e-06"),
    ):
        blocks = new_raptor(tiny_model(case, **changes), [2, 1])
        with pytest.raises(ValueError, match=words):
            raptorize(model, blocks=blocks)
    with pytest.raises(ValueError, match=r"made for phases=\[2, 1\]; got \[1, 2\]"):
        raptorize(model, [1, 2], blocks=new_raptor(tiny_model("clip_vision_model"), [2, 1]))
    assert not any(isinstance(module, RaptorTrunk) for module in model.modules())
    raptorize(model, [2, 1])
    with pytest.raises(ValueError, match="This CLIPModel is a Raptor already"):
        raptorize(model, [2, 1])
    with pytest.raises(ValueError, match="This RaptorModel is a Raptor already"):
        raptorize(new_raptor(tiny_model("vit"), [2, 1]), [2, 1])
    dense, _ = HOSTS["UperNet"]()
    dense.backbone = RaptorBackbone(new_raptor(tiny_model("vit"), [2, 1]).config)
    with pytest.raises(ValueError, match="UperNet.* is a Raptor already, at 'backbone'"):
        raptorize(dense, [2, 1])
    assert not find_towers(dense)


def test_blocks_that_a_trunk_cannot_use_are_refused_in_words():
    model, _ = HOSTS["CLIPModel"]()
    with pytest.raises(ValueError, match="blocks must be a Raptor .*; got a CLIPVisionModel"):
        raptorize(model, blocks=tiny_model("clip_vision_model"))
    for name, value in (("num_applications", 2), ("exit_angle", 5.0)):
        blocks = new_raptor(tiny_model("clip_vision_model"), [2, 1])
        setattr(blocks.config, name, value)
        with pytest.raises(ValueError, match=f"has {name}={value}, .* Set {name} to None"):
            raptorize(model, blocks=blocks)


def test_blocks_of_another_teacher_are_told_by_their_embeddings():
    teacher, host = tiny_model("vit"), tiny_model("vit")
    raptor = new_raptor(teacher, [2, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        raptorize(host, blocks=raptor)
        raptorize(tiny_model("vit").bfloat16(), blocks=raptor)  # rounded, and the same
    tuned = tiny_model("vit")
    tuned.embeddings.cls_token *= 1.25
    with pytest.warns(UserWarning, match=r": 1 of \d+ differ, .*cls_token, by 0\.2 of"):
        raptorize(tuned, blocks=raptor)


def test_a_model_of_two_towers_needs_a_name():
    model, _ = HOSTS["CLIPModel"]()
    model.second = transformers.CLIPVisionModel(model.config.vision_config)
    with pytest.raises(ValueError, match=r"several vision towers, \['vision_model', 'second'\]"):
        raptorize(model, [2, 1])
    raptorize(model, [2, 1], tower="second")
    assert isinstance(model.second.encoder.layers, RaptorTrunk)


def test_nothing_is_unpickled(tmp_path):
    model, _ = HOSTS["CLIPModel"]()
    raptorize(model, [2, 1]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="read from safetensors, never a pickle"):
        transformers.AutoModel.from_pretrained(tmp_path, use_safetensors=False)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="no file named model.safetensors"):
        transformers.AutoModel.from_pretrained(tmp_path)

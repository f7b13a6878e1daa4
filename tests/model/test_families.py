"""Every family that can teach: what is taken over is the teacher's own, to the last token."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import AutoModel

from raptor_hf import (
    RaptorBackbone,
    RaptorForDepthEstimation,
    RaptorForImageClassification,
    RaptorForSemanticSegmentation,
    RaptorModel,
    make_raptor,
    raptorize,
)
from raptor_hf.configuration_raptor import TEACHER_FAMILIES, token_layout
from raptor_hf.distillation.arguments import ObjectiveArguments
from raptor_hf.distillation.blocks import chain_of
from raptor_hf.distillation.matching import TrajectoryMatching
from raptor_hf.modeling_raptor import ROTARY_ANGLES, rotary_angles
from raptor_hf.runs.files import read_json, write_json
from raptor_hf.tasks.task import Depth
from raptor_hf.teachers import normed_state, trajectory
from raptor_hf.teachers.layers import LAYER_PARTS
from raptor_hf.teachers.states import run_layers
from tests.families import CASES, facts, sizes_of, tiny_model
from tests.helpers import assert_same_outputs

RESULTS = Path(__file__).parents[2] / "evaluation" / "results"
EVERY_CASE = pytest.mark.parametrize("case", CASES)
WITH_CONTEXT = pytest.mark.parametrize(
    "case", [case for case in CASES if CASES[case][0] in ROTARY_ANGLES]
)
EVERY_FAMILY = pytest.mark.parametrize("case", TEACHER_FAMILIES)


def images(size, seed=1):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


def copy_of(teacher):
    """A Raptor with a block a layer, each a copy of it."""
    phases = [1] * teacher.config.num_hidden_layers
    raptor = make_raptor(teacher, phases, init="teacher", depth_scaling=False)
    raptor.set_attn_implementation("eager")
    return raptor.eval()


@EVERY_CASE
@torch.no_grad()
def test_a_raptor_of_copied_layers_is_the_teacher(case):
    teacher = tiny_model(case)
    raptor = copy_of(teacher)
    for size in sizes_of(teacher):
        expected, found = trajectory(teacher, images(size)), raptor.trajectory(images(size))
        patches = (size[0] // 4) * (size[1] // 4)
        layout = token_layout(teacher.config)
        assert expected.shape == (2, 4, layout.num_prefix_tokens + patches, 24)
        assert torch.equal(found[:, 0], expected[:, 0])
        assert_same_outputs(found, expected)
        assert_same_outputs(normed_state(raptor, images(size)), normed_state(teacher, images(size)))
        # from any layer on, without the images
        assert_same_outputs(
            raptor.rollout(expected[:, 1], start=1, image_size=size), expected[:, 1:]
        )
        run = run_layers(teacher, expected[:, 1], [2, 3], size)
        assert_same_outputs(torch.stack(run, dim=1), expected[:, 1:])


@EVERY_FAMILY
def test_the_table_in_the_docs_is_true(case):
    written = read_json(RESULTS / "families.json")[case]
    found = facts(case)
    for name in ("state_0", "copied", "trunk"):  # rounding differs between processors
        assert max(found.pop(name), written.pop(name)) < 1e-6
    assert found == written


@EVERY_CASE
@torch.no_grad()
def test_every_attention_gives_the_same(case):
    raptor = copy_of(tiny_model(case))
    expected = raptor.trajectory(images((16, 16)))
    raptor.set_attn_implementation("sdpa")
    assert_same_outputs(raptor.trajectory(images((16, 16))), expected, 1e-5)


@EVERY_FAMILY
def test_ten_steps_of_distillation_lower_the_loss(case):
    teacher = tiny_model(case)
    size = sizes_of(teacher)[-1]
    states = trajectory(teacher, images(size))
    torch.manual_seed(0)
    raptor = make_raptor(teacher, [2, 1]).train()
    module = TrajectoryMatching(
        [chain_of(raptor, None)],
        ObjectiveArguments(objective="autoregressive"),
        token_layout(teacher.config).groups(),
        angles=rotary_angles(teacher, size),
    )
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(10):
        losses.append(sum(loss for loss, *_ in module(states, 0.9).values()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert all(weight.grad is not None for weight in module.parameters())
    # what was learned is what the model does with images
    expected = states[:, 1:]
    found = raptor.eval().trajectory(images(size))[:, 1:]
    with torch.no_grad():
        loss = sum(loss for loss, *_ in module(states, 0.9).values())
    torch.testing.assert_close((found - expected).square().mean(), loss)


@torch.no_grad()
def test_states_of_another_size_are_refused_where_the_size_matters():
    raptor = copy_of(tiny_model("dinov3_vit"))
    states = raptor.trajectory(images((24, 20)))
    for wrong in ({}, {"image_size": (20, 20)}):
        with pytest.raises(ValueError, match=r"\d+ tokens; the states have 33. Give the height"):
            raptor.rollout(states[:, 0], **wrong)
    with pytest.raises(ValueError, match="16×16 pixels have 19 tokens; the states have 33"):
        raptor.advance(states[:, 0], 1)
    fixed = copy_of(tiny_model("aimv2_vision_model"))
    message = r"'aimv2_vision_model' takes images of 16×16 .* \(24, 20\)"
    with pytest.raises(ValueError, match=message):
        fixed(images((24, 20)))


@torch.no_grad()
def test_a_size_of_its_own_that_is_no_multiple_of_the_patch():
    """As SigLIP-so400m has: what is left over at the edges is not looked at."""
    teacher = tiny_model("siglip_vision_model", image_size=18)
    raptor = copy_of(teacher)
    expected = trajectory(teacher, images((18, 18)))
    assert expected.shape == (2, 4, 16, 24)
    assert_same_outputs(raptor.trajectory(images((18, 18))), expected)
    with pytest.raises(ValueError, match="multiples of the patch .4×4 pixels.; got 19×18"):
        raptor(images((19, 18)))
    backbone = RaptorBackbone(raptor.config).eval()
    [maps] = backbone(images((18, 18))).feature_maps
    tokens = backbone.raptor(images((18, 18))).last_hidden_state
    assert torch.equal(maps, tokens.mT.unflatten(2, (4, 4)))
    rotating = copy_of(tiny_model("dinov3_vit", image_size=18))
    expected = rotating.trajectory(images((18, 18)))
    assert_same_outputs(rotating.rollout(expected[:, 0]), expected)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("dinov2", {"registers": 1}, r"should have 18 tokens .*4×4 patches.*, and has 17. Its row"),
        ("clip_vision_model", {"embeddings": ("embeddings",)}, "the embeddings of this CLIPVision"),
        ("dinov3_vit", {"final_norm": None}, "the final norm of this DINOv3ViTModel .* differ by"),
        ("clip_vision_model", {"output_normed": True}, "the final norm of this CLIPVisionModel"),
    ],
)
def test_a_wrong_row_is_seen(family, change, message, monkeypatch):
    teacher = tiny_model(family)
    monkeypatch.setitem(TEACHER_FAMILIES, family, TEACHER_FAMILIES[family]._replace(**change))
    with pytest.raises(ValueError, match=message):
        make_raptor(teacher, [2, 1], init="teacher")


def test_a_wrong_place_of_weights_is_seen(monkeypatch):
    wrong = LAYER_PARTS["vit"]._replace(norms=("layernorm_before",) * 2)
    monkeypatch.setitem(LAYER_PARTS, "vit", wrong)
    with pytest.raises(ValueError, match="a copy of the first layer of this ViTModel"):
        make_raptor(tiny_model("vit"), [2, 1], init="teacher")


@pytest.mark.parametrize("kind", ["offloaded", torch.int8, torch.float8_e4m3fn])
def test_an_offloaded_or_quantised_teacher_is_refused(kind):
    """As Accelerate, bitsandbytes and finegrained float8 leave it."""
    teacher, blocks = tiny_model("vit"), copy_of(tiny_model("vit"))
    linear = teacher.layers[1].mlp.fc1
    if kind == "offloaded":
        cpu_offload(linear)
        message = "layers.1.mlp.fc1.weight .* offloaded or quantised .meta, torch.float32"
    else:
        linear.weight = nn.Parameter(linear.weight.to(kind), requires_grad=False)
        message = f"layers.1.mlp.fc1.weight .* offloaded or quantised .cpu, {kind}"
    with pytest.raises(ValueError, match=message):
        make_raptor(teacher, [2, 1])
    with pytest.raises(ValueError, match=message):
        raptorize(teacher, blocks=blocks)


def test_positions_that_are_random_in_training_are_not_so_here():
    teacher = tiny_model("dinov3_vit")
    teacher.config.pos_embed_rescale = teacher.rope_embeddings.config.pos_embed_rescale = 2.0
    expected = rotary_angles(teacher, (24, 20))
    new = make_raptor(teacher, [2, 1])
    states = new.embed(images((24, 20)))
    trained = RaptorModel(new.config).train()
    for raptor in (new, RaptorModel(new.config), trained):  # the first two are in no mode yet
        assert_same_outputs(raptor.position_embeddings(states, (24, 20)), expected)


def test_what_needs_a_cls_token_says_so():
    raptor = make_raptor(tiny_model("siglip_vision_model"), [2, 1], init="teacher")
    config = raptor.config
    assert raptor(images((16, 16))).pooler_output is None
    assert RaptorForImageClassification(config).classifier.in_features == 24
    segmenter = RaptorForSemanticSegmentation(config).eval()
    assert segmenter(images((24, 20))).logits.shape == (2, 2, 6, 5)
    maps = RaptorBackbone(config).eval()(images((24, 20))).feature_maps
    assert [tuple(m.shape) for m in maps] == [(2, 24, 6, 5)]
    with pytest.raises(ValueError, match="depth head looks at .patch, cls., .* has no cls token"):
        RaptorForDepthEstimation(config)
    with pytest.raises(ValueError, match="probe of depth looks at the cls token"):
        Depth(config, 8)


@torch.no_grad()
def test_a_plain_checkpoint_of_earlier_versions_loads(tmp_path):
    """Its configuration has the fields that went, or lacks those that came."""
    raptor = make_raptor(tiny_model("dinov2"), [2, 1]).eval()
    raptor.save_pretrained(tmp_path)
    saved = read_json(tmp_path / "config.json")
    old = {"correction_rank": 0, "correction_on": "attention", "ffn_experts": 1, "qk_norm": False,
           "position_bias": False, "exit_angle": None, "initializer_range": 0.02,
           "semantic_loss_ignore_index": 255}  # fmt: skip
    lacking = {n: v for n, v in saved.items() if n not in ("block_norm", "intermediate_size")}
    expected = raptor.trajectory(images((16, 16)))
    for fields in (saved | old, lacking):
        write_json(tmp_path / "config.json", fields)
        loaded = AutoModel.from_pretrained(tmp_path)
        assert_same_outputs(loaded.trajectory(images((16, 16))), expected)
        assert not set(old) & set(loaded.config.to_dict())
    write_json(tmp_path / "config.json", saved | {"ffn_experts": 2})
    with pytest.raises(ValueError, match="ffn_experts=2 is no longer supported"):
        AutoModel.from_pretrained(tmp_path)


def test_an_image_takes_its_own_patches_in_order():
    """MAE shuffles them unless it is told the order."""
    teacher = tiny_model("vit_mae")
    raptor = copy_of(teacher)
    first = raptor.trajectory(images((16, 16)))
    assert torch.equal(first, raptor.trajectory(images((16, 16))))
    dark = images((16, 16))
    dark[:, :, 4:8, 8:12] = 0.0  # the patch of row 1, column 2
    changed = (raptor.embed(dark) != first[:, 0]).any(dim=-1).any(dim=0)
    assert changed.nonzero().flatten().tolist() == [1 + 4 * 1 + 2]


@torch.no_grad()
def test_in_half_precision_angles_may_be_finer():
    """MLCD's are float32 whatever its weights are: the states keep their own precision."""
    teacher = tiny_model("mlcd_vision_model").bfloat16()
    assert rotary_angles(teacher, (16, 16))[0].dtype == torch.float32
    expected = trajectory(teacher, images((16, 16)).bfloat16())
    assert_same_outputs(copy_of(teacher).trajectory(images((16, 16))), expected, 2e-2)


@pytest.mark.parametrize("case", ["dinov3_vit", "vit_mae", "siglip_vision_model", "radio"])
@torch.no_grad()
def test_offloaded_it_gives_the_same(case, tmp_path):
    raptor = make_raptor(tiny_model(case), [2, 1], init="teacher").eval()
    expected = raptor.trajectory(images((16, 16)))
    raptor.save_pretrained(tmp_path)
    options = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offloaded"}
    on_disk = RaptorModel.from_pretrained(tmp_path, **options)
    assert on_disk.device.type == "meta"
    assert_same_outputs(on_disk.trajectory(images((16, 16))), expected)
    assert_same_outputs(on_disk.rollout(expected[:, 0]), expected)


@WITH_CONTEXT
def test_what_inference_left_behind_can_be_trained_with(case):
    teacher = tiny_model(case)
    raptor = make_raptor(teacher, [2, 1], init="teacher").eval()
    size = (28, 20)  # that no other test has: transformers keeps the positions of a size, too
    with torch.inference_mode():
        trajectory(teacher, images(size))
        raptor(images(size))
    raptor(images(size)).last_hidden_state.sum().backward()


@torch.no_grad()
def test_threads_may_run_images_of_new_sizes_at_once():
    raptor = make_raptor(tiny_model("dinov3_vit"), [2, 1]).eval()
    sizes = [(4 * rows, 8) for rows in range(2, 12)]
    expected = [raptor(images(size)).last_hidden_state for size in sizes]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda size: raptor(images(size)).last_hidden_state, 4 * sizes))
    assert_same_outputs(found, 4 * expected)


def test_learned_angles_are_trained_and_never_stale():
    """MLCD learns the angle of its cls token."""
    teacher = tiny_model("mlcd_vision_model").requires_grad_(True)
    raptor = copy_of(teacher).requires_grad_(True)
    for model in (teacher, raptor):
        states = model(images((16, 16)), output_hidden_states=True).hidden_states
        states[-1].square().sum().backward()
    assert_same_outputs(raptor.shell.class_pos_emb.grad, teacher.class_pos_emb.grad, 1e-4)
    with torch.no_grad():
        before = raptor.trajectory(images((16, 16)))
        raptor.shell.class_pos_emb.mul_(5)
        teacher.class_pos_emb.mul_(5)
        found = raptor.trajectory(images((16, 16)))
        assert not torch.allclose(found, before)
        assert_same_outputs(found, trajectory(teacher, images((16, 16))))

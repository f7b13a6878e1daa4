"""What a depth changes in the linear layers of a block: corrections, and shares of experts."""

import copy
import os
import signal
import sys
import time

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

from raptor_hf import RaptorConfig, RaptorModel, make_raptor, raptorize
from raptor_hf.distillation.blocks import make_chains, raptor_from_blocks, save_blocks
from raptor_hf.distillation.compute import application_flops
from raptor_hf.distillation.starts import new_raptor
from raptor_hf.loop import configure_compute
from raptor_hf.loop.arguments import ComputeArguments
from raptor_hf.modeling_raptor import RaptorBlock
from raptor_hf.teachers.layers import layer_parts, teacher_layer_weights
from tests.families import HOSTS
from tests.helpers import assert_same_outputs, randomised
from tests.programs import run, start

PHASES, SPANS = [3, 2, 1], [(0, 3), (3, 5), (5, 6)]
BOTH = {"correction_rank": 4, "correction_on": "all", "ffn_experts": 2}
OPTIONS = [
    {"correction_rank": 4},
    {"correction_rank": 4, "correction_on": "ffn"},
    {"correction_rank": 4, "correction_on": "all"},
    {"ffn_experts": 2},
    BOTH,
]
on_every_option = pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda options: "-".join(map(str, options.values()))
)


@pytest.fixture
def raptor(teacher):
    return randomised(make_raptor(teacher, PHASES, **BOTH))


def plain_block(block, depth, config):
    """A block without any changes that has the weights which this one has at a depth."""
    weights = {name: weight.double() for name, weight in block.state_dict().items()}
    row = depth - 1 - block.start
    own = {n: w for n, w in weights.items() if not n.startswith(("corrections", "expert_shares"))}
    if "expert_shares" in weights:
        exponentials = weights["expert_shares"][row].exp()
        for name in own:
            if name.startswith("ffn."):
                experts = zip(exponentials / exponentials.sum(), own[name], strict=True)
                own[name] = sum(share * weight for share, weight in experts)
    places = {"qkv": "attention", "proj": "attention", "fc1": "ffn", "fc2": "ffn"}
    for name, place in places.items():
        if f"corrections.{name}.up" in weights:
            up, down = (weights[f"corrections.{name}.{part}"][row] for part in ("up", "down"))
            own[f"{place}.{name}.weight"] = own[f"{place}.{name}.weight"] + up @ down
    config = copy.deepcopy(config)
    config.correction_rank, config.ffn_experts = 0, 1
    plain = RaptorBlock(config).eval()
    plain.load_state_dict(own)
    return plain


def test_a_plain_raptor_has_no_more_weights_than_before(teacher):
    model = make_raptor(teacher, PHASES)
    assert not [n for n in model.state_dict() if "corrections" in n or "experts" in n]
    assert type(model.blocks[0].ffn.fc1) is type(model.blocks[0].ffn.fc2) is nn.Linear


@pytest.mark.parametrize("correction_on", ["attention", "ffn", "all"])
def test_new_corrections_change_nothing(teacher, pixel_values, correction_on):
    plain = randomised(make_raptor(teacher, PHASES))
    options = {"correction_rank": 4, "correction_on": correction_on}
    corrected = make_raptor(teacher, PHASES, **options).eval()
    lacking = corrected.load_state_dict(plain.state_dict(), strict=False)
    assert not lacking.unexpected_keys
    assert lacking.missing_keys and all(".corrections." in name for name in lacking.missing_keys)
    with torch.no_grad():
        assert torch.equal(corrected.trajectory(pixel_values), plain.trajectory(pixel_values))
    for block in corrected.blocks:
        for correction in block.corrections.values():
            width = correction.down.shape[-1]
            assert 0.6 < correction.down.std() * width**0.5 < 1.4


@on_every_option
@pytest.mark.parametrize("ffn", ["gelu", "swiglu", "relu"])
@torch.no_grad()
def test_every_depth_by_hand(teacher, options, ffn):
    model = randomised(make_raptor(teacher, PHASES, ffn=ffn, **options))
    states = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))
    for depth in range(1, 7):
        block = model.blocks[model.config.phase_of(depth)]
        expected = plain_block(block, depth, model.config)(states, depth)
        assert_same_outputs(block(states, depth), expected)


@on_every_option
@torch.no_grad()
def test_depths_at_once_are_depths_one_by_one(teacher, options):
    model = randomised(make_raptor(teacher, PHASES, **options))
    for block, (first, last) in zip(model.blocks, SPANS, strict=True):
        depths = torch.arange(first + 1, last + 1)
        states = torch.randn(2, len(depths), 7, 24, generator=torch.Generator().manual_seed(2))
        apart = [block(states[:, n], int(depth)) for n, depth in enumerate(depths)]
        assert_same_outputs(block(states, depths), torch.stack(apart, dim=1))
        block.fold_scales(6)
        assert_same_outputs(block(states, depths), torch.stack(apart, dim=1))


@torch.no_grad()
def test_beyond_its_span_a_block_changes_what_it_does_at_the_nearest_layer(raptor):
    block = raptor.blocks[1]
    states = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(3))
    for depth, nearest in ((1, 4), (3, 4), (6, 5), (9, 5)):
        for given in (depth, torch.tensor([depth])):
            expected = plain_block(block, nearest, raptor.config)(states, depth)
            assert_same_outputs(block(states, given), expected)
    alone = RaptorBlock(raptor.config)  # without a span: for all layers
    assert alone.corrections["proj"].up.shape == (6, 24, 4) and alone.expert_shares.shape == (6, 2)


@pytest.mark.parametrize("depth_scaling", [True, False])
@torch.no_grad()
def test_folded_and_compiled_by_one_graph(teacher, pixel_values, depth_scaling):
    model = make_raptor(teacher, PHASES, depth_scaling=depth_scaling, **BOTH)
    plain = randomised(model).trajectory(pixel_values)
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model.prepare_for_inference(compile=True, backend=count)
    assert_same_outputs(model.trajectory(pixel_values), plain)
    assert len(graphs) == 1
    model.train()
    model.blocks[0].corrections["proj"].up.add_(1)
    assert not torch.allclose(model.trajectory(pixel_values)[:, 1], plain[:, 1])


@pytest.mark.slow
@torch.no_grad()
def test_inductor_gives_the_same(raptor, pixel_values):
    plain = raptor.trajectory(pixel_values)
    torch._dynamo.reset()
    compiled = raptor.prepare_for_inference(compile=True)
    assert_same_outputs(compiled.trajectory(pixel_values), plain, 1e-5)


@torch.no_grad()
def test_save_and_load(raptor, pixel_values, tmp_path):
    raptor.save_pretrained(tmp_path)
    again = RaptorModel.from_pretrained(tmp_path)
    for name, weight in raptor.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    expected = raptor.trajectory(pixel_values)
    assert_same_outputs(again.trajectory(pixel_values), expected)
    half = RaptorModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same_outputs(half.trajectory(pixel_values.bfloat16()).float(), expected, 0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_outputs(raptor.trajectory(pixel_values).float(), expected, 0.05)


def test_lost_weights_start_as_new_ones(raptor, tmp_path):
    """A plain Raptor's folder, loaded with corrections: transformers draws what is not there."""
    raptor.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {n: w for n, w in weights.items() if "corrections" not in n and "expert" not in n}
    again = RaptorModel.from_pretrained(None, config=raptor.config, state_dict=kept)
    assert not any(c.up.any() for block in again.blocks for c in block.corrections.values())
    mix = again.blocks[0].expert_shares.softmax(dim=-1)
    torch.testing.assert_close(mix, torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9]]))


@torch.no_grad()
def test_a_program_equals_the_model(raptor, pixel_values):
    raptor.requires_grad_(False)
    shape = {"pixel_values": {0: Dim("batch")}}
    program = torch.export.export(raptor, (torch.randn(2, 3, 8, 8),), dynamic_shapes=shape)
    found = program.module()(pixel_values)["last_hidden_state"]
    assert_same_outputs(found, raptor(pixel_values).last_hidden_state, 1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_onnx_equals_the_model(raptor, pixel_values, tmp_path):
    raptor.requires_grad_(False)
    shape = {"pixel_values": {0: Dim("batch")}}
    program = torch.export.export(raptor, (torch.randn(2, 3, 8, 8),), dynamic_shapes=shape)
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    found = torch.from_numpy(session.run(None, {"pixel_values": pixel_values.numpy()})[0])
    assert_same_outputs(found, raptor(pixel_values).last_hidden_state, 1e-4)


def test_gradients_reach_what_depth_changes(raptor, pixel_values):
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            configure_compute(raptor.train(), ComputeArguments(gradient_checkpointing=True))
        raptor.zero_grad()
        raptor.trajectory(pixel_values).square().mean().backward()
        found.append({n: p.grad.clone() for n, p in raptor.blocks.named_parameters()})
    for name, gradient in found[0].items():
        if ".corrections." in name or "expert_shares" in name:  # at every layer
            assert gradient.flatten(1).any(dim=1).all(), name
        assert_same_outputs(found[1][name], gradient, 1e-4)


@torch.no_grad()
def test_a_model_around_a_tower_takes_the_blocks():
    model, inputs = HOSTS["ViTForImageClassification"]()
    raptor = new_raptor(model.vit, [2, 1], **BOTH)
    randomised(raptor.blocks)
    expected = raptor.trajectory(inputs["pixel_values"])
    states = raptorize(model, blocks=raptor)(**inputs, output_hidden_states=True).hidden_states
    assert_same_outputs(torch.stack(states, dim=1), expected)


def test_blocks_of_stage_1_make_a_raptor(teacher, pixel_values, tmp_path):
    chains = make_chains(teacher, SPANS, weights=None, last_weights=None, init="aligned", **BOTH)
    spans = [chain.spans[0] for chain in chains]
    for span in spans:
        randomised(span.block)
    save_blocks(spans, tmp_path)
    model = raptor_from_blocks(teacher, PHASES, tmp_path).eval()
    with torch.no_grad():
        trajectory = model.trajectory(pixel_values)
        state = trajectory[:, 0]
        for span in spans:
            for depth in range(span.start + 1, span.stop + 1):
                state = span.block(state, depth)
                assert_same_outputs(trajectory[:, depth], state)


@pytest.mark.parametrize(
    ("experts", "runs"),
    [(1, [[0, 1, 2]]), (2, [[0, 1], [2]]), (3, [[0], [1], [2]]), (5, [[0], [0], [1], [1], [2]])],
)
@pytest.mark.parametrize("init", ["teacher", "aligned"])
def test_experts_start_as_the_means_of_runs_of_layers(teacher, init, experts, runs):
    layer = teacher.encoder.layer[0].state_dict()
    for number in (1, 2):  # heads and units in one order, so that there is nothing to align
        changed = {name: (1 + 0.1 * number) * weight for name, weight in layer.items()}
        teacher.encoder.layer[number].load_state_dict(changed)
    model = new_raptor(teacher, [3, 3], init=init, ffn_experts=experts)
    parts = layer_parts(teacher.config)
    layers = [teacher_layer_weights(teacher.encoder.layer[n], parts) for n in range(3)]
    block = model.blocks[0]
    for name, weight in block.ffn.state_dict().items():
        means = [torch.stack([layers[n][f"ffn.{name}"] for n in run]).mean(0) for run in runs]
        assert torch.equal(weight, means[0] if experts == 1 else torch.stack(means))
    if experts > 1:
        mix = block.expert_shares.softmax(dim=-1)
        for number, shares in enumerate(mix):
            own = [number in run for run in runs]
            assert shares[own].sum().item() == pytest.approx(0.9)
            assert len({round(share, 5) for share in shares[own].tolist()}) == 1


def test_of_one_layer_all_experts_are_its_own(teacher):
    model = new_raptor(teacher, [5, 1], ffn_experts=3)
    assert torch.equal(model.blocks[1].expert_shares.softmax(-1), torch.full((1, 3), 1 / 3))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"correction_rank": -1}, r"correction_rank must lie in 0 … 24, .*; got -1"),
        ({"correction_rank": 25}, r"correction_rank must lie in 0 … 24, .*; got 25"),
        ({"correction_on": "qkv"}, "must be 'attention', 'ffn' or 'all'; got 'qkv'"),
        ({"ffn_experts": 0}, r"ffn_experts must be 1 \(a plain FFN\) or more; got 0"),
        ({"ffn_expert": 2}, "did you mean 'ffn_experts'"),
    ],
)
def test_wrong_values_are_refused(teacher, wrong, message):
    with pytest.raises(ValueError, match=message):
        RaptorConfig(teacher_config=teacher.config, phases=PHASES, **wrong)


@pytest.mark.parametrize(
    ("options", "per_layer", "per_block"),
    [
        ({"correction_rank": 3}, 3 * (24 + 24), 0),
        ({"correction_rank": 3, "correction_on": "ffn"}, 3 * (96 + 24), 0),
        (
            {"correction_rank": 3, "correction_on": "all"},
            3 * ((24 + 72) + (24 + 24) + (24 + 96) + (96 + 24)),
            0,
        ),
        ({"ffn_experts": 4}, 4, 3 * (24 * 96 + 96 + 96 * 24 + 24)),
    ],
)
def test_parameters_by_hand(teacher, options, per_layer, per_block):
    plain, more = (
        sum(p.numel() for p in make_raptor(teacher, PHASES, **o).blocks.parameters())
        for o in ({}, options)
    )
    assert more - plain == 6 * per_layer + 3 * per_block


@on_every_option
@pytest.mark.parametrize("ffn", ["gelu", "swiglu"])
def test_flops_are_what_torch_counts(teacher, options, ffn):
    model = make_raptor(teacher, PHASES, ffn=ffn, depth_scaling=False, **options)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model.advance(torch.zeros(2, 7, 24), 2)
    assert counter.get_total_flops() == 2 * application_flops(model.config, 7, batch_size=2)


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bytes(teacher, images, store, tmp_path):
    teacher.save_pretrained(tmp_path / "teacher")
    images.processor.save_pretrained(tmp_path / "teacher")
    command = [sys.executable, "training/distill_raptor.py", "--teacher", tmp_path / "teacher"]
    command += ["--activations", store, "--phases", "4", "2", "--optimizer", "muon"]
    command += ["--steps", "40", "--batch_size", "4", "--warmup_steps", "2", "--report_to", "none"]
    command += ["--checkpoint_every", "2", "--normalize", "none"]
    for name, value in BOTH.items():
        command += [f"--{name}", value]
    run(*command, "--output_dir", tmp_path / "whole")
    parts = tmp_path / "parts"
    process = start(*command, "--output_dir", parts, new_process=True)
    while not list(parts.glob("checkpoints/step_*")) and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert "going on after step" in run(*command, "--output_dir", parts, "--resume").stdout
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (parts / "model.safetensors").read_bytes() == whole
    model = RaptorModel.from_pretrained(parts)
    assert all(c.up.any() for block in model.blocks for c in block.corrections.values())

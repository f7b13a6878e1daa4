"""Every fast path gives what the plain path does."""

import sys
from importlib.machinery import PathFinder

import pytest
import torch

from raptor_hf import RaptorForImageClassification, make_raptor
from tests.helpers import assert_same_outputs, randomised
from tests.programs import ROOT, run


@pytest.fixture
def raptor(teacher):
    return randomised(make_raptor(teacher, [3, 2, 1]))


class Counter:
    """A backend of torch.compile that compiles nothing and counts graphs."""

    graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def close(found, expected):
    scale = max(state.abs().max() for state in expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=2e-6)


@torch.no_grad()
def test_folded_scales_change_nothing(raptor, pixel_values):
    plain = raptor(pixel_values, True).hidden_states
    assert raptor.prepare_for_inference() is raptor
    block = raptor.blocks[0]
    assert block.folded_scales.shape == (7, 3, 24)
    depth_scaling, block.depth_scaling = block.depth_scaling, None  # it is not asked any more
    close(raptor(pixel_values, True).hidden_states, plain)
    block.depth_scaling = depth_scaling
    assert "folded_scales" not in " ".join(raptor.state_dict())


def test_training_drops_folded_scales(raptor, pixel_values):
    raptor.prepare_for_inference().train()
    with torch.no_grad():
        for block in raptor.blocks:
            assert block.folded_scales is None
            block.depth_scaling.fc2.bias += 1
        changed = raptor(pixel_values, True).hidden_states
        close(
            raptor.prepare_for_inference()(pixel_values, True).hidden_states,
            changed,
        )


def test_a_raptor_without_depth_scaling_has_nothing_to_fold(teacher, pixel_values):
    model = make_raptor(teacher, [4, 2], depth_scaling=False).eval()
    with torch.no_grad():
        plain = model(pixel_values).last_hidden_state
        same = model.prepare_for_inference()(pixel_values).last_hidden_state
        assert_same_outputs(same, plain)


@torch.no_grad()
@pytest.mark.parametrize("folded", [False, True])
def test_one_graph_serves_all_blocks_and_all_their_applications(raptor, pixel_values, folded):
    plain = raptor(pixel_values, True).hidden_states
    torch._dynamo.reset()
    counter = Counter()
    if folded:
        raptor.prepare_for_inference(compile=True, backend=counter)
    else:
        for block in raptor.blocks:
            block.compile(fullgraph=True, backend=counter)
    close(raptor(pixel_values, True).hidden_states, plain)
    assert counter.graphs == 1
    raptor(torch.cat([pixel_values, pixel_values]))  # another batch size: once more, for any
    raptor(torch.cat([pixel_values, pixel_values, pixel_values]))
    assert counter.graphs == 2


@pytest.mark.slow
@torch.no_grad()
def test_inductor_gives_the_same(raptor, pixel_values):
    plain = raptor(pixel_values, True).hidden_states
    torch._dynamo.reset()
    close(
        raptor.prepare_for_inference(compile=True)(
            pixel_values, output_hidden_states=True
        ).hidden_states,
        plain,
    )


@torch.no_grad()
def test_fewer_applications_by_hand(raptor, pixel_values):
    raptor.config.num_applications = 3
    assert raptor.config.applied_layers() == [1, 4, 6]
    found = raptor(pixel_values, True).hidden_states
    state = raptor.embed(pixel_values)
    for depth in range(1, 7):
        state = raptor.advance(state, depth) if depth in raptor.config.applied_layers() else state
        assert_same_outputs(found[depth], state)


@torch.no_grad()
def test_images_that_settle_keep_their_state(teacher, pixel_values):
    raptor = randomised(make_raptor(teacher, [2, 4]))
    for block in raptor.blocks:  # smaller steps than random ones
        block.layer_scale1 *= 0.1
        block.layer_scale2 *= 0.1
    plain = torch.stack(raptor(pixel_values, True).hidden_states, dim=1)
    cosine = torch.nn.functional.cosine_similarity(plain[:, :-1, 0], plain[:, 1:, 0], dim=-1)
    turn = torch.rad2deg(torch.arccos(cosine))[:, 2:]  # by the last block
    angle = turn[:, :-1].min(dim=1).values.median().item() + 0.01  # some settle, some don't
    raptor.config.exit_angle = angle
    found = torch.stack(raptor(pixel_values, True).hidden_states, dim=1)
    settled = 0
    for image in range(len(pixel_values)):
        quiet = [n + 3 for n in range(4) if turn[image, n] < angle]
        stop = min([*quiet, 6])
        settled += stop < 6
        for layer in range(7):
            torch.testing.assert_close(
                found[image, layer], plain[image, min(layer, stop)], rtol=1e-4, atol=1e-4
            )
    assert 0 < settled < len(pixel_values)
    with pytest.raises(ValueError, match="attentions can't be told"):
        raptor(pixel_values, output_attentions=True)


@torch.no_grad()
def test_a_classifier_exits_early_as_its_configuration_says(teacher, pixel_values, tmp_path):
    config = make_raptor(teacher, [2, 4]).config
    config.num_labels = 5
    model = randomised(RaptorForImageClassification(config))
    everywhere = model(pixel_values).logits
    model.save_pretrained(tmp_path)
    load = RaptorForImageClassification.from_pretrained
    stopped = load(tmp_path, exit_angle=180.0)  # after one of the last block
    states = model.trajectory(pixel_values)
    assert_same_outputs(stopped.trajectory(pixel_values)[:, 6], states[:, 3])
    fewer = load(tmp_path, num_applications=2)
    states = fewer.trajectory(pixel_values)
    assert torch.equal(states[:, 1], states[:, 5])
    fewer = fewer(pixel_values)
    assert not torch.equal(fewer.logits, everywhere)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_applications": 0}, "num_applications must lie in 1 … 6"),
        ({"num_applications": 7}, "num_applications must lie in 1 … 6"),
        ({"exit_angle": 0.0}, "exit_angle is an angle in degrees"),
        ({"exit_angle": 181.0}, "exit_angle is an angle in degrees"),
    ],
)
def test_fewer_applications_out_of_range(raptor, wrong, message):
    for name, value in wrong.items():
        setattr(raptor.config, name, value)
    with pytest.raises(ValueError, match=message):
        raptor.config.check_phases()


IN_INT8 = """
import sys, torch
from torchao.quantization import Int8DynamicActivationInt8WeightConfig
from transformers import AutoModel, TorchAoConfig
import raptor_hf

folder, pixel_values = sys.argv[1], torch.load(sys.argv[2], weights_only=True)
config = TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
exact = AutoModel.from_pretrained(folder + "/float32")
small = AutoModel.from_pretrained(folder + "/float32", quantization_config=config)
assert type(small.blocks[0].ffn.fc1.weight).__name__ == "Int8Tensor"
scaling = [model.blocks[0].depth_scaling.fc2.weight for model in (exact, small)]
assert torch.equal(*scaling)
with torch.no_grad():
    a, b = (model(pixel_values, True).hidden_states[-1] for model in (exact, small))
    small.save_pretrained(folder + "/int8")
    loaded = AutoModel.from_pretrained(folder + "/int8")
    again = loaded(pixel_values, True).hidden_states[-1]
weights = [model.state_dict() for model in (small, loaded)]
assert weights[0].keys() == weights[1].keys()
for one, other in zip(*(w.values() for w in weights)):
    parts = ("qdata", "scale") if hasattr(one, "qdata") else ("data",)
    assert all(torch.equal(getattr(one, part), getattr(other, part)) for part in parts)
# the last bit of a state may decide to which whole number it is rounded
assert (again - b).abs().max() < 1e-2 * b.abs().max()
print("error", ((a - b).square().sum() / (a - a.mean((0, 1))).square().sum()).item())
"""


@pytest.mark.slow
def test_int8_is_near_and_comes_back_from_a_folder(raptor, pixel_values, tmp_path):
    # torchao lies apart: see pyproject.toml
    paths = [str(ROOT / ".venv" / "int8"), *sys.path]
    if not PathFinder.find_spec("torchao", paths):
        pytest.skip("the extra int8 is not installed")
    with torch.no_grad():
        for block in raptor.blocks:  # a trained model's branches are small beside its states
            block.layer_scale1 *= 0.1
            block.layer_scale2 *= 0.1
    raptor.save_pretrained(tmp_path / "float32")
    torch.save(pixel_values, tmp_path / "images.pt")
    variables = {"PYTHONPATH": f"{ROOT}:{ROOT / '.venv' / 'int8'}"}
    done = run(
        sys.executable, "-c", IN_INT8, tmp_path, tmp_path / "images.pt", **variables
    )  # fmt: skip
    assert 0 < float(done.stdout.split("error")[1]) < 1e-3

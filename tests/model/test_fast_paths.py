"""Every fast path gives what the plain path does."""

import sys
from importlib.machinery import PathFinder

import pytest
import torch

from raptor_hf import RaptorModel, make_raptor
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


@torch.no_grad()
def test_one_graph_serves_all_blocks_and_all_their_applications(raptor, pixel_values):
    plain = raptor(pixel_values, True).hidden_states
    torch._dynamo.reset()
    counter = Counter()
    assert raptor.compile_blocks(backend=counter) is raptor
    assert_same_outputs(raptor(pixel_values, True).hidden_states, plain)
    assert counter.graphs == 1
    raptor(torch.cat([pixel_values, pixel_values]))  # another batch size: once more, for any
    raptor(torch.cat([pixel_values, pixel_values, pixel_values]))
    assert counter.graphs == 2


@torch.no_grad()
def test_fewer_applications_stop_after_so_many_layers(raptor, pixel_values, tmp_path):
    expected = raptor(pixel_values, True).hidden_states
    raptor.save_pretrained(tmp_path)
    fewer = RaptorModel.from_pretrained(tmp_path, num_applications=4)
    found = fewer(pixel_values, True, output_attentions=True)
    assert_same_outputs(found.hidden_states[:5], expected[:5])
    assert all(torch.equal(state, found.hidden_states[4]) for state in found.hidden_states[5:])
    assert_same_outputs(found.last_hidden_state, raptor.norm(expected[4]))
    assert len(found.attentions) == 4


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
    done = run(sys.executable, "-c", IN_INT8, tmp_path, tmp_path / "images.pt", **variables)
    assert 0 < float(done.stdout.split("error")[1]) < 1e-3

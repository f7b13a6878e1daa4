import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
)

from raptor_hf.heads import load_linear_head
from raptor_hf.modeling_raptor import pool_tokens
from raptor_hf.probes import FeatureDataset, LoopArguments, train_linear_probe
from tests.conftest import SIZES

WEIGHTS = {
    "weight": torch.arange(5 * 48.0).view(5, 48),
    "bias": torch.arange(5.0),
}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_published_head_file_is_read_as_it_is(suffix, tmp_path):
    path = tmp_path / f"dinov2_vits14_reg4_linear_head.{suffix}"
    torch.save(WEIGHTS, path) if suffix == "pth" else save_file(WEIGHTS, path)
    head, names = load_linear_head(path, hidden_size=24)
    assert torch.equal(head.weight, WEIGHTS["weight"])
    assert torch.equal(head.bias, WEIGHTS["bias"])
    assert names is None


@pytest.mark.parametrize(
    ("config_class", "model_class"),
    [
        (Dinov2Config, Dinov2ForImageClassification),
        (Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification),
    ],
)
@torch.no_grad()
def test_the_head_of_a_classifier_gives_its_logits(
    config_class, model_class, tmp_path, pixel_values
):
    torch.manual_seed(0)
    classifier = model_class(config_class(**SIZES, id2label={0: "a", 1: "b", 2: "c"})).eval()
    torch.nn.init.normal_(classifier.classifier.weight)
    classifier.save_pretrained(tmp_path)
    head, names = load_linear_head(tmp_path, hidden_size=24)
    assert names == ["a", "b", "c"]
    states = classifier.base_model(pixel_values).last_hidden_state
    features = pool_tokens(states, classifier.config)  # cls first, then patches without registers
    torch.testing.assert_close(head(features), classifier(pixel_values).logits)


def test_heads_that_do_not_fit_are_refused(tmp_path, teacher):
    path = tmp_path / "head.pth"
    torch.save(WEIGHTS, path)
    with pytest.raises(
        ValueError, match=r"expected .* \(classes, 64\).* of 32 channels; got \(5, 48\)"
    ):
        load_linear_head(path, hidden_size=32)
    torch.save({**WEIGHTS, "bias": torch.zeros(4)}, path)
    with pytest.raises(ValueError, match=r"bias \(classes,\).* and \(4,\)"):
        load_linear_head(path, hidden_size=24)
    torch.save({"weight": WEIGHTS["weight"]}, path)
    with pytest.raises(ValueError, match=r"holds 'weight' and 'bias'; found \['weight'\]"):
        load_linear_head(path, hidden_size=24)
    teacher.save_pretrained(tmp_path / "backbone")
    with pytest.raises(ValueError, match="has no trained linear classifier"):
        load_linear_head(tmp_path / "backbone", hidden_size=24)


def test_a_probe_starts_from_a_head(tmp_path):
    torch.save(WEIGHTS, tmp_path / "head.pth")
    head, _ = load_linear_head(tmp_path / "head.pth", hidden_size=24)
    data = FeatureDataset(torch.randn(20, 48), torch.zeros(20, dtype=torch.long))
    arguments = LoopArguments(
        output_dir=str(tmp_path / "probe"), steps=0, batch_size=4, report_to="none"
    )
    probe = train_linear_probe(data, 5, arguments, head=head)
    assert torch.equal(probe.weight, WEIGHTS["weight"])
    tuned = train_linear_probe(data, 5, LoopArguments(**{**vars(arguments), "steps": 3}), head=head)
    assert not torch.equal(tuned.weight, WEIGHTS["weight"])
    assert torch.equal(head.weight, WEIGHTS["weight"])
    with pytest.raises(ValueError, match="The head has 5 classes, but the dataset has 10"):
        train_linear_probe(data, 10, arguments, head=head)

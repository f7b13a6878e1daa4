import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from raptor_hf import make_raptor
from raptor_hf.modeling_raptor_heads import (
    RaptorForDepthEstimation,
    RaptorForSemanticSegmentation,
    pool_tokens,
)
from raptor_hf.tasks.heads import arrange_head, attach_head, load_linear_head
from raptor_hf.tasks.task import Depth, Segmentation
from tests.helpers import SIZES, Payload

BACKBONE = Dinov2Config(hidden_size=24)
WEIGHTS = {
    "weight": torch.arange(5 * 48.0).view(5, 48),
    "bias": torch.arange(5.0),
}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_published_head_file_is_read_as_it_is(suffix, tmp_path):
    path = tmp_path / f"dinov2_vits14_reg4_linear_head.{suffix}"
    torch.save(WEIGHTS, path) if suffix == "pth" else save_file(WEIGHTS, path)
    head, names = load_linear_head(path, config=BACKBONE)
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
    head, names = load_linear_head(tmp_path, config=BACKBONE)
    assert names == ["a", "b", "c"]
    states = classifier.base_model(pixel_values).last_hidden_state
    features = pool_tokens(states, classifier.config)  # cls first, then patches without registers
    torch.testing.assert_close(head(features), classifier(pixel_values).logits)


@pytest.mark.parametrize(
    ("content", "hidden_size", "words"),
    [
        (WEIGHTS, 32, r"\(classes, 64\).* got \(5, 48\)"),
        ({**WEIGHTS, "bias": torch.zeros(4)}, 24, r"and \(4,\)"),
        ({"weight": WEIGHTS["weight"]}, 24, "'weight' and 'bias'"),
        ({"weight": 1, "bias": 2}, 24, "tensors"),
    ],
)
def test_heads_that_do_not_fit_are_refused(content, hidden_size, words, tmp_path):
    torch.save(content, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=words):
        load_linear_head(tmp_path / "head.pth", config=Dinov2Config(hidden_size=hidden_size))


def test_models_without_such_a_head_are_refused(tmp_path, teacher):
    teacher.save_pretrained(tmp_path / "backbone")
    with pytest.raises(ValueError, match="no trained linear classifier"):
        load_linear_head(tmp_path / "backbone", config=BACKBONE)
    # as wide as a head on cls and patches, but on cls alone
    config = ViTConfig(**SIZES | {"hidden_size": 48, "num_hidden_layers": 1}, intermediate_size=8)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="holds vit .* whose head reads the same"):
        load_linear_head(tmp_path / "vit", config=BACKBONE)
    with pytest.raises(FileNotFoundError, match="no such head file"):
        load_linear_head(tmp_path / "absent.pth", config=BACKBONE)


def test_files_that_are_no_heads_are_refused_and_not_run(tmp_path):
    harm, path = tmp_path / "harm", tmp_path / "head.pth"
    torch.save({**WEIGHTS, "extra": Payload(harm)}, path)
    with pytest.raises(ValueError, match="nothing in it was run"):
        load_linear_head(path, config=BACKBONE)
    assert not harm.exists()
    torch.load(path, weights_only=False)  # this test can fail: read without care, it does harm
    assert harm.exists()
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("not a head")
        with pytest.raises(ValueError, match="damaged|more than tensors"):
            load_linear_head(tmp_path / name, config=BACKBONE)
    torch.save(WEIGHTS, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # torch.load reads other weights
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        load_linear_head(path, config=BACKBONE)


@torch.no_grad()
def test_a_raptor_classifier_gives_its_head_back(tmp_path, teacher, pixel_values):
    raptor = make_raptor(teacher, [4, 2]).eval()
    head = torch.nn.Linear(48, 3)
    classifier = attach_head(raptor, head)
    assert classifier.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    features = pool_tokens(raptor(pixel_values).last_hidden_state, raptor.config)
    torch.testing.assert_close(classifier(pixel_values).logits, head(features))
    attach_head(raptor, head, ["a", "b", "c"]).save_pretrained(tmp_path)
    again, names = load_linear_head(tmp_path, config=BACKBONE)
    assert torch.equal(again.weight, head.weight)
    assert names == ["a", "b", "c"]
    with pytest.raises(ValueError, match="The head has 3 classes; got 1 names"):
        attach_head(raptor, head, ["a"])


def test_heads_of_dense_tasks_have_their_own_widths(tmp_path, teacher):
    raptor = make_raptor(teacher, [4, 2]).eval()
    head = torch.nn.Linear(24, 3)
    attach_head(
        raptor, head, ["a", "b", "c"], model_class=RaptorForSemanticSegmentation
    ).save_pretrained(tmp_path / "segmentation")
    again, names = load_linear_head(tmp_path / "segmentation", config=BACKBONE, task=Segmentation)
    assert torch.equal(again.weight, head.weight) and names == ["a", "b", "c"]
    bins = torch.nn.Linear(48, 7)
    fields = {"depth_bins": 7, "min_depth": 0.5, "max_depth": 3.0}
    model = attach_head(raptor, bins, model_class=RaptorForDepthEstimation, **fields)
    assert (model.config.min_depth, model.config.max_depth) == (0.5, 3.0)
    model.save_pretrained(tmp_path / "depth")
    again, _ = load_linear_head(tmp_path / "depth", config=BACKBONE, task=Depth)
    assert torch.equal(again.weight, bins.weight)
    torch.save(WEIGHTS, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=r"\(classes, 24\).* got \(5, 48\)"):
        load_linear_head(tmp_path / "head.pth", config=BACKBONE, task=Segmentation)


def arranged(head_names, class_names):
    """Which outputs the head of some names has, once it is arranged for some classes."""
    head = nn.Linear(2, len(head_names))
    head.weight.data[:, 0] = torch.arange(len(head_names))
    order = arrange_head(head, head_names, class_names, source="the head")
    assert head.weight[:, 0].tolist() == order
    return order


def test_classes_are_matched_by_name():
    pets = ["cat", "dog", "ant"]
    assert arranged(pets, ["ant", "cat", "dog"]) == [2, 0, 1]
    assert arranged(pets, ["ant", "dog"]) == [2, 1, 0]  # the rest follows
    assert arranged(pets, pets) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"lacks 'bee' \(1 of 2\); its own are cat, dog"):
        arranged(pets, ["bee", "cat"])


BIRDS = [f"bird {n:03d}" for n in range(200)]
SWAPPED = [*BIRDS[:7], BIRDS[8], BIRDS[7], *BIRDS[9:]]
AS_TEXT = sorted(map(str, range(12)))  # 0, 1, 10, 11, 2, …: as a folder lists them


@pytest.mark.parametrize(
    ("head_names", "class_names", "order"),
    [
        (BIRDS, SWAPPED, [*range(7), 8, 7, *range(9, 200)]),
        ([f"LABEL_{n}" for n in range(12)], AS_TEXT, [int(name) for name in AS_TEXT]),
        ([f"word {n}" for n in range(12)], AS_TEXT, [int(name) for name in AS_TEXT]),
        (AS_TEXT, AS_TEXT, list(range(12))),  # a head of these folders, saved with their names
        (["7", "5000000"], ["5000000", "7"], [1, 0]),
        ([f"LABEL_{n}" for n in range(3)], ["00", "02", "01"], [0, 2, 1]),
    ],
)
def test_names_decide_and_places_do_not(head_names, class_names, order):
    assert arranged(head_names, class_names) == order


def test_a_number_beyond_the_outputs_is_no_class():
    with pytest.raises(ValueError, match="lacks '12'"):
        arranged([f"LABEL_{n}" for n in range(12)], [str(n + 1) for n in range(12)])


def test_without_names_the_number_counts():
    numbers = [f"LABEL_{n}" for n in range(3)]
    assert arranged(numbers, ["ant", "bee", "cat"]) == [0, 1, 2]
    assert arranged(["ant", "bee", "cat"], ["0", "1"]) == [0, 1, 2]
    for names in (["ant", "bee"], ["a", "b", "c", "d"]):
        with pytest.raises(ValueError, match="the head has 3 classes and the images have"):
            arranged(numbers, names)


def test_imagenets_folders():
    words = [f"word {n}" for n in range(1000)]
    assert arranged(words, [f"n{n:08d}" for n in range(1000)]) == list(range(1000))
    with pytest.raises(ValueError, match="has 1000 classes and the images have 100"):
        arranged(words, [f"n{n:08d}" for n in range(100)])

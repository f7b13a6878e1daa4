"""A folder with a Raptor, on a machine that has transformers and not this package."""

import json
import sys

import pytest
from safetensors.torch import load_file, save_file
from transformers import DPTImageProcessorPil

from raptor_hf import make_raptor
from raptor_hf.configuration_raptor import TEACHER_FAMILIES
from raptor_hf.data import make_processor
from raptor_hf.modeling_raptor_heads import AUTO_CLASSES
from tests.families import PIXELS, tiny_model
from tests.helpers import assert_same_outputs, make, randomised, tensors
from tests.programs import ROOT, WITHOUT_THE_PACKAGE, run

LOAD = """
import json
import sys
import transformers
from safetensors.torch import load_file, save_file

root, classes = sys.argv[1], json.loads(sys.argv[2])
images = load_file(f"{root}/images.safetensors")["pixel_values"]
for name, folder in classes:
    if name == "AutoBackbone":  # asks the Hub even for a folder
        config = transformers.AutoConfig.from_pretrained(f"{root}/{folder}", trust_remote_code=True)
        model = transformers.AutoBackbone.from_config(config, trust_remote_code=True).eval()
        model = type(model).from_pretrained(f"{root}/{folder}")
    else:
        auto_class = getattr(transformers, name)
        model = auto_class.from_pretrained(f"{root}/{folder}", trust_remote_code=True)
    outputs = model(images, output_attentions=True)
    tensors = {
        f"{key}.{index}": tensor.detach().contiguous().clone()
        for key, field in outputs.items()
        for index, tensor in enumerate(field if isinstance(field, tuple) else (field,))
    }
    save_file(tensors, f"{root}/{name}-{folder}.safetensors")
"""
PIPELINES = """
from PIL import Image

picture, said = Image.new("RGB", (40, 30), (200, 30, 90)), {}
for task in ("image-classification", "image-segmentation", "depth-estimation"):
    folder = f"{root}/{task}"
    said[task] = transformers.pipeline(task, folder, trust_remote_code=True)(picture)
features = transformers.pipeline(
    "image-feature-extraction", f"{root}/image-classification", trust_remote_code=True
)(picture)
print(json.dumps({
    "labels": [answer["label"] for answer in said["image-classification"]],
    "mask": said["image-segmentation"][0]["mask"].size,
    "depth": list(said["depth-estimation"]["predicted_depth"].shape),
    "features": [len(features[0]), len(features[0][0])],
}))
"""
FOLDERS = {
    "image-classification": "AutoModelForImageClassification",
    "image-segmentation": "AutoModelForSemanticSegmentation",
    "depth-estimation": "AutoModelForDepthEstimation",
}


@pytest.fixture
def folders(teacher, pixel_values, tmp_path):
    """A folder for each task, with a model and its image processor, and some images beside them."""
    for folder, auto_class in FOLDERS.items():
        model = make(AUTO_CLASSES[auto_class], teacher, num_labels=3)
        model.save_pretrained(tmp_path / folder)
        dense = DPTImageProcessorPil(size={"height": 8, "width": 8})
        processor = make_processor(8) if folder == "image-classification" else dense
        processor.save_pretrained(tmp_path / folder)
    save_file({"pixel_values": pixel_values}, tmp_path / "images.safetensors")
    return tmp_path


def test_the_code_of_a_saved_model_is_the_packages_own(folders):
    for folder in FOLDERS:
        files = {file.name for file in (folders / folder).iterdir()}
        code = {"configuration_raptor.py", "modeling_raptor.py", "modeling_raptor_heads.py"}
        assert files == code | {"config.json", "model.safetensors", "preprocessor_config.json"}
        for name in code:
            package = ROOT / "raptor_hf" / name
            assert (folders / folder / name).read_bytes() == package.read_bytes()
        auto_map = json.loads((folders / folder / "config.json").read_text())["auto_map"]
        assert set(auto_map) == {"AutoConfig", *AUTO_CLASSES}


def test_models_and_pipelines_run_without_this_package(folders, pixel_values):
    classes = [(auto_class, folder) for folder, auto_class in FOLDERS.items()]
    classes += [("AutoModel", "depth-estimation"), ("AutoBackbone", "image-classification")]
    code = WITHOUT_THE_PACKAGE + LOAD + PIPELINES
    done = run(sys.executable, "-c", code, folders, json.dumps(classes), new_process=True)
    for auto_class, folder in classes:
        model = AUTO_CLASSES[auto_class].from_pretrained(folders / folder)
        expected = tensors(model(pixel_values, output_attentions=True))
        found = load_file(folders / f"{auto_class}-{folder}.safetensors")
        assert_same_outputs(found, expected)
    said = json.loads(done.stdout.splitlines()[-1])
    assert set(said["labels"]) == {"LABEL_0", "LABEL_1", "LABEL_2"}
    assert said["mask"] == [40, 30] and said["depth"] == [30, 40]
    assert said["features"] == [7, 24]


def test_every_family_loads_without_the_package(tmp_path):
    """Their code is flat files beside the weights; what is told of a family travels with them."""
    models = {}
    for family in TEACHER_FAMILIES:
        models[family] = randomised(make_raptor(tiny_model(family), [2, 1]))
        models[family].save_pretrained(tmp_path / family)
    save_file({"pixel_values": PIXELS}, tmp_path / "images.safetensors")
    classes = json.dumps([("AutoModel", family) for family in models])
    code = WITHOUT_THE_PACKAGE + LOAD
    run(sys.executable, "-c", code, tmp_path, classes, HF_HOME=str(tmp_path / "cache"))
    for family, model in models.items():
        expected = tensors(model(PIXELS, output_attentions=True))
        found = load_file(tmp_path / f"AutoModel-{family}.safetensors")
        assert_same_outputs(found, expected, 1e-5)

"""The probes' recipes on small folders in the layouts of the real datasets, as users run them."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForDepthEstimation,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    pipeline,
)

from evaluation import probe as probe_program
from raptor_hf import make_raptor
from raptor_hf.data import make_processor
from raptor_hf.data.decoding import to_pixel_values
from raptor_hf.tasks.dense_images import load_segmentation
from raptor_hf.tasks.digit_scenes import digit_scenes
from tests.helpers import randomised
from tests.layouts import write_ade20k, write_imagenet, write_nyuv2
from tests.programs import ACCELERATE_LAUNCH, TWO_PROCESSES, run

LAUNCH = [*ACCELERATE_LAUNCH, "evaluation/probe.py"]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """A random teacher with DINOv2's patch of 14 pixels, and a random Raptor of it."""
    folder = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(
        image_size=56, patch_size=14, hidden_size=12, num_hidden_layers=3, num_attention_heads=2
    )
    teacher = Dinov2WithRegistersModel(config).eval()
    raptor = make_raptor(teacher, [2, 1])
    randomised(raptor.blocks)
    for name, model in (("teacher", teacher), ("raptor", raptor)):
        model.save_pretrained(folder / name)
        make_processor(224).save_pretrained(folder / name)
    return ["--teacher", folder / "teacher", "--models", f"raptor_k2={folder / 'raptor'}"]


def results_of(folder, task):
    files = (folder / "results").glob(f"*_{task}.json")
    return {result["model"]: result for result in map(json.loads, map(Path.read_text, files))}


SMALL = ["--steps", "2", "--num_workers", "1"]
SMALL += ["--held_out", "0.4", "--report_to", "none"]


def test_imagenet_recipe(backbones, tmp_path):
    data = write_imagenet(tmp_path / "imagenet")
    head = tmp_path / "head.pth"
    torch.save({"weight": torch.zeros(10, 24), "bias": torch.zeros(10)}, head)
    recipe = "training/recipes/imagenet_probe.yaml"
    # two files are no images
    for path in sorted(data.glob("train/n00000000/*"))[:2]:
        path.write_bytes(b"broken")
    command = [*LAUNCH, recipe, "--dataset", data, "--head", head, *backbones, *SMALL]
    command += ["--batch_size", "4", "--output_dir", tmp_path / "run"]
    refused = run(*command, check=False)
    assert refused.returncode and "can't be decoded" in refused.stderr
    done = run(*command, "--skip_corrupt", "--output_dir", tmp_path / "tolerant")
    assert "The next image takes its place" in done.stderr
    results = results_of(tmp_path / "tolerant", "classification")
    assert set(results) == {"teacher", "raptor_k2", "constant"}
    found = results["raptor_k2"]
    assert found["selected"]["pooling"] in ("cls_patches", "cls", "patches")
    assert set(found["metrics"]["knn"]) == {"accuracy", "top5"} < set(found["metrics"])
    model = AutoModelForImageClassification.from_pretrained(
        tmp_path / "tolerant" / "models" / "raptor_k2"
    )
    assert model.config.id2label[3] == "n00000003"
    assert not (tmp_path / "tolerant" / "features").exists()
    again = [*command, "--skip_corrupt", "--output_dir", tmp_path / "tolerant"]
    assert "finished already" in run(*again).stdout
    gone = sorted(data.glob("val/n00000002/*"))[0]
    gone.unlink()
    refused = run(*again, check=False)  # a table never holds models judged on different images
    assert refused.returncode and "test_images: made with" in refused.stderr


def test_ade20k_recipe(backbones, tmp_path):
    data = write_ade20k(tmp_path / "ADEChallengeData2016", number=3, size=(60, 80))
    recipe = "training/recipes/ade20k_probe.yaml"
    run(*LAUNCH, recipe, "--dataset", data, *backbones, *SMALL, "--batch_size", "1",
        "--learning_rate_grid", "1", "3", "--eval_batch_size", "1", "--resolution", "126",
        "--output_dir", tmp_path / "run")  # fmt: skip
    results = results_of(tmp_path / "run", "segmentation")
    found = results["raptor_k2"]["metrics"]
    assert len(found["iou"]) == 150 and 0 <= found["miou"] <= 1
    assert 0 <= found["original_size"]["miou"] <= 1
    assert results["constant"]["metrics"]["pixel_accuracy"] > 0.5
    model_dir = tmp_path / "run" / "models" / "raptor_k2"
    model = AutoModelForSemanticSegmentation.from_pretrained(model_dir)
    assert model.config.num_labels == 150 and model.config.id2label[0] == "thing 1"
    assert (tmp_path / "run" / "results" / "raptor_k2_segmentation.png").stat().st_size > 1000
    image = digit_scenes("test", 1)[0]["image"].convert("RGB")
    assert pipeline("image-segmentation", model=str(model_dir))(image)[0]["mask"].size == (64, 48)


def test_nyuv2_recipe(backbones, tmp_path):
    data = write_nyuv2(tmp_path / "nyu_data", number=3, size=(480, 640))
    recipe = "training/recipes/nyuv2_probe.yaml"
    run(*LAUNCH, recipe, "--dataset", data, *backbones, *SMALL, "--batch_size", "1",
        "--eval_batch_size", "1", "--output_dir", tmp_path / "run")  # fmt: skip
    found = results_of(tmp_path / "run", "depth")["raptor_k2"]
    assert found["metrics"]["rmse_m"] > 0
    assert (tmp_path / "run" / "results" / "teacher_depth.png").stat().st_size > 1000
    model_dir = tmp_path / "run" / "models" / "raptor_k2"
    model = AutoModelForDepthEstimation.from_pretrained(model_dir)
    assert model.classifier.out_features == 256
    image = digit_scenes("test", 1)[0]["image"].convert("RGB")
    depth = pipeline("depth-estimation", model=str(model_dir))(image)["predicted_depth"]
    assert depth.shape == (48, 64) and depth.min() > 0 and depth.max() < 10


@pytest.mark.parametrize("task", ["classification", pytest.param("depth", marks=pytest.mark.slow)])
def test_two_processes_find_what_one_does(task, backbones, tmp_path):
    recipe = f"tests/recipes/digits_{task}_probe.yaml"
    flags = ["evaluation/probe.py", recipe, *backbones[:2], "--test_images", "13"]
    run(sys.executable, *flags, "--output_dir", tmp_path / "one")
    run(*TWO_PROCESSES, *flags, "--output_dir", tmp_path / "two", ACCELERATE_USE_CPU="true")
    one, two = (results_of(tmp_path / name, task) for name in ("one", "two"))
    assert set(one) == set(two) == {"teacher", "constant"}
    for name in one:
        for figure in ("accuracy", "miou", "pixel_accuracy", "rmse_m", "abs_rel"):
            found = two[name]["metrics"].get(figure)
            assert one[name]["metrics"].get(figure) == pytest.approx(found, abs=1e-5)
        assert one[name]["metrics"].get("knn") == two[name]["metrics"].get("knn")
        pooling = [results[name].get("selected", {}).get("pooling") for results in (one, two)]
        assert pooling[0] == pooling[1]


def probe(*flags):
    """Run the program in this process."""
    probe_program.main([str(flag) for flag in flags])


def test_models_that_cannot_be_judged_are_refused_before_the_first_is(backbones, tmp_path, caplog):
    """A Raptor of another teacher, also by the dry run; a split that is judged on itself."""
    teacher = Dinov2WithRegistersModel.from_pretrained(backbones[1])
    teacher.embeddings.cls_token.data += 0.1
    teacher.save_pretrained(tmp_path / "other")
    make_processor(112).save_pretrained(tmp_path / "other")
    flags = ["--teacher", tmp_path / "other", *backbones[2:], "--test_split", "train", *SMALL]
    for dry_run in ([], ["--dry_run"]):
        with pytest.raises(ValueError, match="raptor_k2 was made from another teacher than"):
            probe(*flags, *dry_run, "--output_dir", tmp_path / "run")
    assert "The heads are judged on the images that they learn from: 'train'" in caplog.text
    assert not (tmp_path / "run").exists()


def test_splits_with_other_classes_are_refused(backbones, tmp_path):
    data = write_imagenet(tmp_path / "imagenet", number=1)
    (data / "val" / "n00000009").rename(data / "val" / "n00000010")
    recipe = ["training/recipes/imagenet_probe.yaml", "--dataset", data, *SMALL]
    with pytest.raises(ValueError, match="must have the same classes in the same order"):
        probe(*recipe, *backbones, "--output_dir", tmp_path / "run")


def test_masks_without_a_class_and_other_heads_are_refused_before_training(
    backbones, tmp_path, caplog
):
    data, head = write_ade20k(tmp_path / "ade", size=(28, 28)), tmp_path / "head.pth"
    torch.save({"weight": torch.zeros(5, 12), "bias": torch.zeros(5)}, head)
    recipe = ["training/recipes/ade20k_probe.yaml", "--dataset", data, *SMALL, "--batch_size", "1"]
    flags = [*recipe, *backbones, "--output_dir", tmp_path / "run"]
    with pytest.raises(ValueError, match=r"head\.pth has 5 classes and the images have 150"):
        probe(*flags, "--head", head)
    for mask in (data / "annotations" / "validation").iterdir():
        Image.new("L", (28, 28)).save(mask)  # background alone
    with pytest.raises(ValueError, match="No pixel of 2 masks has a class"):
        probe(*flags)
    assert "of 150 classes have no pixel: thing 1," in caplog.text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings", [{}, {"do_normalize": False}])
def test_a_saved_segmenter_reads_images_and_masks_as_they_were_judged(
    settings, backbones, tmp_path
):
    data = write_ade20k(tmp_path / "ade", number=3, size=(60, 80))
    teacher = tmp_path / "teacher"
    shutil.copytree(backbones[1], teacher)
    path = teacher / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    flags = ["--task", "segmentation", "--train_split", "training", "--test_split", "validation"]
    flags += ["--dataset", data, "--teacher", teacher, *backbones[2:], *SMALL, "--batch_size", "2"]
    probe(*flags, "--output_dir", tmp_path / "run")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run" / "models" / "raptor_k2")
    images = load_segmentation(str(data), "validation")
    pixels, mask = images.read(0)
    in_file = Image.open(images.cells[0]["mask"]["path"])
    batch = processor(Image.fromarray(pixels), segmentation_maps=in_file, return_tensors="pt")
    assert torch.equal(batch["labels"][0], torch.from_numpy(mask))
    whole = {"do_resize": False, "do_center_crop": False}
    judged = to_pixel_values([pixels], AutoImageProcessor.from_pretrained(teacher), **whole)
    torch.testing.assert_close(batch["pixel_values"], judged)

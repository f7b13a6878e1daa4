import numpy as np
import pytest
import torch
from PIL import Image

from raptor_hf.data import ReadingArguments, make_processor
from raptor_hf.data.arguments import CropArguments
from raptor_hf.data.transforms import Augmentation
from raptor_hf.modeling_raptor_heads import drop_registers, pool_tokens
from raptor_hf.probes.arguments import ProbeArguments
from raptor_hf.probes.features import compute_features
from raptor_hf.probes.images import ProbeImages, load_splits
from raptor_hf.tasks.arguments import DenseArguments
from raptor_hf.tasks.dense_images import load_segmentation
from raptor_hf.tasks.labelled_images import load_classification
from raptor_hf.tasks.task import Classification, Segmentation
from tests.layouts import write_ade20k


@pytest.fixture
def ade20k(tmp_path):
    return write_ade20k(tmp_path / "ade", number=4)


def test_views_are_functions_of_seed_and_row():
    images = load_segmentation("digit_scenes", "test")
    crops = CropArguments(crop_scale=[0.2, 0.5])
    options = {"augmentation": Augmentation(crops, (24, 32))}
    options["image_ids"] = np.array([7, 3])
    first, again, other = (
        ProbeImages(images, make_processor(8), **options, seed=seed) for seed in (1, 1, 2)
    )
    batch = first.__getitems__([0, 1, 2])  # row 2 is image 7 in a second view
    assert batch["pixel_values"].shape == (3, 3, 24, 32)
    assert batch["target"].shape == (3, 24, 32)
    assert batch["image_id"].tolist() == [7, 3, 7]
    assert not torch.equal(batch["pixel_values"][0], batch["pixel_values"][2])
    assert torch.equal(batch["pixel_values"][2:], again.__getitems__([2])["pixel_values"])
    assert not torch.equal(batch["pixel_values"][2:], other.__getitems__([2])["pixel_values"])


def test_image_and_mask_share_crop_and_flip():
    """Where the mask says digit the image is bright, in every view."""
    images = load_segmentation("digit_scenes", "train")
    augmentation = Augmentation(CropArguments(crop_scale=[0.3, 0.9]), (48, 64))
    views = ProbeImages(images, make_processor(8), augmentation=augmentation)
    batch = views.__getitems__(list(range(20)))
    digit, bright = batch["target"] < 10, batch["pixel_values"][:, 0]
    assert bright[digit].mean() > bright[~digit].mean() + 1.5
    assert (bright[digit] > bright[~digit].mean()).float().mean() > 0.9


def test_the_next_image_takes_the_place_of_an_unreadable_one(ade20k, teacher, tmp_path):
    (ade20k / "images" / "training" / "ADE_train_00000001.jpg").write_bytes(b"no image")
    images, task = load_segmentation(str(ade20k), "training"), Segmentation(teacher.config, 150)
    with pytest.raises(ValueError, match=r"00000001\.jpg can't be decoded"):
        ProbeImages(images, make_processor(8)).__getitems__([0, 1])
    tolerant = ProbeImages(images, make_processor(8), skip_corrupt=True)
    with pytest.warns(UserWarning, match=r"00000001\.jpg can't be decoded"):
        features = compute_features(teacher, task, tolerant, tmp_path / "features", batch_size=2)
    assert features.image_ids.tolist() == [0, 2, 3]  # a score counts every image once
    assert np.array_equal(features.__getitems__([1])["target"][0], images.target(2))


def test_images_of_several_sizes_need_a_resolution(ade20k, teacher, tmp_path):
    for part, kind in (("images", "jpg"), ("annotations", "png")):
        path = ade20k / part / "training" / f"ADE_train_00000000.{kind}"
        Image.open(path).resize((30, 20), Image.Resampling.NEAREST).save(path)
    images = load_segmentation(str(ade20k), "training")
    plain, task = ProbeImages(images, make_processor(8)), Segmentation(teacher.config, 150)
    with pytest.raises(ValueError, match="several sizes .20×30, 48×64.: give --resolution"):
        plain.__getitems__([0, 1])
    with pytest.raises(ValueError, match="several sizes .20×30, 48×64.: give --resolution"):
        compute_features(teacher, task, plain, tmp_path / "features", batch_size=1)
    batch = ProbeImages(images, make_processor(8), resolution=(16, 24)).__getitems__([0, 1])
    assert batch["pixel_values"].shape == (2, 3, 16, 24) and batch["target"].shape == (2, 16, 24)


@pytest.mark.parametrize("dense", [False, True])
def test_features_are_the_models_and_are_computed_once(dense, teacher, tmp_path, monkeypatch):
    load, name = (load_segmentation, "digit_scenes") if dense else (load_classification, "digits")
    task = Segmentation(teacher.config, 11) if dense else Classification(teacher.config, 10)
    rows = np.array([2, 5, 9])
    images = ProbeImages(load(name, "test"), make_processor(8), rows)
    features = compute_features(teacher, task, images, tmp_path / "features", batch_size=2)
    batch = images.__getitems__([0, 1, 2])
    states = teacher(batch["pixel_values"]).last_hidden_state
    expected = (drop_registers if dense else pool_tokens)(states, teacher.config)
    stored = features.__getitems__([0, 1, 5])  # row 5 is image 2 once more
    torch.testing.assert_close(stored["features"], expected)
    assert torch.equal(stored["target"], batch["target"])
    assert stored["image_id"].tolist() == rows.tolist()
    monkeypatch.setattr("raptor_hf.probes.features.backbone_features", None)  # not called again
    compute_features(teacher, task, images, tmp_path / "features", batch_size=2)
    with pytest.raises(TypeError):
        compute_features(teacher, task, images, tmp_path / "others", batch_size=2)


def test_held_out_training_images_select_and_never_train():
    def splits(num_heads, seed=0, **values):
        arguments = (ProbeArguments(**values), DenseArguments(), ReadingArguments(), None)
        return load_splits(*arguments, num_heads=num_heads, seed=seed)

    def number(splits):
        return [len(splits[name]) for name in ("train", "selection", "validation")]

    grid = splits(2)
    assert number(splits(1)) == [1437, 0, 360] and number(grid) == [1293, 144, 360]
    assert {*grid["train"].image_ids, *grid["selection"].image_ids} == set(range(1437))
    few = splits(2, train_images=100, test_images=20, seed=3)
    assert number(few) == [90, 10, 20]
    # all seeds are judged on the same images
    same = splits(1, test_images=20)["validation"]
    assert np.array_equal(few["validation"].image_ids, same.image_ids)
    with pytest.raises(ValueError, match="at least two training images"):
        splits(2, train_images=1)

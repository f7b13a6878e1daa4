import json

import numpy as np
import pytest
import torch

from raptor_hf.data import ReadingArguments, make_processor
from raptor_hf.data.arguments import CropArguments
from raptor_hf.data.transforms import Augmentation
from raptor_hf.data.views import skip_corrupt
from raptor_hf.loop.arguments import LoopArguments
from raptor_hf.modeling_raptor_heads import drop_registers, pool_tokens
from raptor_hf.probes.arguments import ProbeArguments
from raptor_hf.probes.datasets import ProbeImageSets
from raptor_hf.probes.features import store_features
from raptor_hf.probes.images import ProbeImages
from raptor_hf.runs.arguments import build_arguments
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
    augmentation = Augmentation(size=(24, 32), scale=(0.2, 0.5))
    options = {"augmentation": augmentation, "rows": np.array([7, 3])}
    first = ProbeImages(images, make_processor(8), **options, seed=1)
    again = ProbeImages(images, make_processor(8), **options, seed=1)
    other = ProbeImages(images, make_processor(8), **options, seed=2)
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
    augmentation = Augmentation(size=(48, 64), scale=(0.3, 0.9))
    batch = ProbeImages(images, make_processor(8), augmentation=augmentation).__getitems__(
        list(range(20))
    )
    digit = batch["target"] < 10
    bright = batch["pixel_values"][:, 0]
    assert bright[digit].mean() > bright[~digit].mean() + 1.5
    assert (bright[digit] > bright[~digit].mean()).float().mean() > 0.9


def test_unreadable_images_are_left_out_and_counted(ade20k, teacher, tmp_path):
    broken = ade20k / "images" / "training" / "ADE_train_00000001.jpg"
    broken.write_bytes(b"no image")
    images = load_segmentation(str(ade20k), "training")
    with pytest.raises(ValueError, match=r"00000001\.jpg can't be decoded"):
        ProbeImages(images, make_processor(8)).__getitems__([0, 1])
    tolerant = skip_corrupt(ProbeImages(images, make_processor(8)), 1)
    with pytest.warns(UserWarning, match=r"left out: .*00000001\.jpg"):
        batch = tolerant.__getitems__([0, 1, 2])
    assert batch["image_id"].tolist() == [0, 2]
    task = Segmentation(teacher.config, 150)
    features = store_features(tmp_path / "features", teacher, task, tolerant, batch_size=2)
    assert features.image_ids.tolist() == [0, 2, 3]
    assert features.subset(np.array([1, 3])).image_ids.tolist() == [3]
    expected = images.target(3)
    assert np.array_equal(features.__getitems__([2])["target"][0], expected)
    (ade20k / "images" / "training" / "ADE_train_00000002.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="unreadable images so far: 2 of 4; --skip_corrupt 1"):
        tolerant.__getitems__([2])


def test_images_of_several_sizes_need_a_resolution(ade20k, teacher, tmp_path):
    from PIL import Image

    for part, kind in (("images", "jpg"), ("annotations", "png")):
        path = ade20k / part / "training" / f"ADE_train_00000000.{kind}"
        Image.open(path).resize((30, 20), Image.Resampling.NEAREST).save(path)
    images = load_segmentation(str(ade20k), "training")
    with pytest.raises(ValueError, match="several sizes .20×30, 48×64.: give --resolution"):
        ProbeImages(images, make_processor(8)).__getitems__([0, 1])
    task = Segmentation(teacher.config, 150)
    with pytest.raises(ValueError, match="several sizes .20×30, 48×64.: give --resolution"):
        plain = ProbeImages(images, make_processor(8))
        store_features(tmp_path / "features", teacher, task, plain, batch_size=1)
    batch = ProbeImages(images, make_processor(8), resolution=(16, 24)).__getitems__([0, 1])
    assert batch["pixel_values"].shape == (2, 3, 16, 24) and batch["target"].shape == (2, 16, 24)


def test_stored_features_are_the_models_and_are_found_again(teacher, tmp_path, monkeypatch):
    images = ProbeImages(load_segmentation("digit_scenes", "test"), make_processor(8),
                         rows=np.array([5, 2, 9]))  # fmt: skip
    task = Segmentation(teacher.config, 11)
    features = store_features(tmp_path, teacher, task, images, batch_size=2)
    batch = images.__getitems__([0, 1, 2])
    expected = drop_registers(teacher(batch["pixel_values"]).last_hidden_state, teacher.config)
    torch.testing.assert_close(features.__getitems__([0, 1, 2])["features"], expected)
    assert torch.equal(features.__getitems__([1])["target"][0], batch["target"][1])
    assert features.image_ids.tolist() == [5, 2, 9]
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "complete.json").read_text())["image_ids"] == [5, 2, 9]
    monkeypatch.setattr("raptor_hf.probes.features.backbone_features", None)  # not called again
    store_features(tmp_path, teacher, task, images, batch_size=2)
    teacher.layernorm.weight.data += 1  # another model
    with pytest.raises(TypeError):
        store_features(tmp_path, teacher, task, images, batch_size=2)


def test_classification_features_are_cls_and_mean_patch(teacher, tmp_path):
    images = ProbeImages(load_classification("digits", "test"), make_processor(8),
                         rows=np.arange(5))  # fmt: skip
    task = Classification(teacher.config, 10)
    features = store_features(tmp_path, teacher, task, images, batch_size=5)
    states = teacher(images.__getitems__(list(range(5)))["pixel_values"]).last_hidden_state
    found = features.__getitems__(list(range(5)))
    torch.testing.assert_close(found["features"], pool_tokens(states, teacher.config))
    assert found["target"].tolist() == [images.images.target(row) for row in range(5)]


def test_a_full_disk_is_said_before_it_is_filled(teacher, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(1000))
    images = ProbeImages(load_segmentation("digit_scenes", "test"), make_processor(8))
    task = Segmentation(teacher.config, 11)
    with pytest.raises(OSError, match="need .* GB in .*; only 1e-06 GB are free"):
        store_features(tmp_path, teacher, task, images, batch_size=2)


def test_a_share_of_the_training_images_selects(tmp_path):
    def sets(**values):
        values = {"output_dir": str(tmp_path), "steps": None, **values}
        recipe, loop = build_arguments(values, ProbeArguments, LoopArguments)
        crops = CropArguments(crop_scale=[], flip=0)
        arguments = (recipe, crops, DenseArguments(), ReadingArguments(), loop)
        return ProbeImageSets(*arguments, Classification, make_processor(8))

    alone = sets()
    assert len(alone.train_rows) == 1437 and len(alone.selection_rows) == 0
    grid = sets(learning_rate_grid=[0.1, 1])
    assert len(grid.train_rows) == 1437 and len(grid.selection_rows) == 144
    assert set(grid.selection_rows) <= set(grid.train_rows)
    few = sets(learning_rate_grid=[0.1, 1], train_images=100, test_images=20, seed=3)
    assert (len(few.train_rows), len(few.selection_rows), len(few.validation_rows)) == (100, 10, 20)
    assert np.array_equal(few.validation_rows, sets(test_images=20).validation_rows)

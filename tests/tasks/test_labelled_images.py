import dataclasses
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from raptor_hf.data import ReadingArguments
from raptor_hf.tasks.arguments import DenseArguments
from raptor_hf.tasks.dense_images import load_depth, load_segmentation
from raptor_hf.tasks.digit_scenes import digit_scenes
from raptor_hf.tasks.labelled_images import load_classification
from raptor_hf.tasks.targets import check_classes, read_depth, read_mask
from raptor_hf.tasks.task import Depth, Segmentation
from tests.layouts import write_ade20k, write_nyuv2


@pytest.fixture
def ade20k(tmp_path):
    return write_ade20k(tmp_path, splits=["training"])


@pytest.fixture
def nyuv2(tmp_path):
    return write_nyuv2(tmp_path)


def test_ade20k_maps_background_to_ignored(ade20k):
    images = load_segmentation(str(ade20k), "training")
    assert len(images) == 2 and len(images.class_names) == 150
    pixels, mask = images.read(1)
    assert pixels.shape == (48, 64, 3)
    expected = np.asarray(digit_scenes("train", 2)[1]["mask"]).astype(int)
    expected[0] = 255
    assert np.array_equal(mask, expected)
    cell = images.cells[1]["mask"]
    with pytest.raises(
        ValueError, match=r"0000001\.png: a mask holds the 10 classes 1 … 10, .* got 11 … 11"
    ):
        read_mask(cell, "mask 1", num_classes=10, first_label=1)


def test_masks_are_the_same_however_their_folder_is_spelt(ade20k, monkeypatch):
    monkeypatch.chdir(ade20k)
    names = (str(ade20k), ".", f"../{ade20k.name}", f"../{ade20k.name}/")
    assert len({load_segmentation(name, "training").files for name in names}) == 1


def test_ade20k_class_names_are_those_of_its_table(ade20k):
    table = ade20k / "objectInfo150.txt"
    assert load_segmentation(str(ade20k), "training").class_names[149] == "thing 150"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines[:9], *lines[10:]]))
    with pytest.raises(ValueError, match=r"classes numbered in a row; got \[1, 2, .*8, 10\]"):
        load_segmentation(str(ade20k), "training")
    table.unlink()
    with pytest.raises(ValueError, match="are unknown. Give --class_names FILE"):
        load_segmentation(str(ade20k), "training")


def test_nyuv2_has_two_units_and_both_become_metres(nyuv2):
    for split, bits, tolerance in (("train", 8, 0.02), ("test", 16, 0.0006)):
        images = load_depth(str(nyuv2), split)
        expected = np.asarray(digit_scenes(split, 2)[0]["depth"]) / 1000
        _, depth = images.read(0)
        assert depth.dtype == np.float32
        np.testing.assert_allclose(depth, expected, atol=tolerance)
        with pytest.raises(
            ValueError, match=rf"0\.png: expected a depth image of {24 - bits} bits"
        ):
            read_depth(images.cells[0]["depth"], "depth 0", unit_m=1, bits=24 - bits)


def test_digit_scenes_come_in_the_same_form():
    _, depth = load_depth("digit_scenes", "test").read(3)
    assert depth.shape == (48, 64) and depth.max() == 10
    images = load_segmentation("digit_scenes", "test")
    _, mask = images.read(3)
    assert (mask == 10).any() and images.class_names[10] == "ground"


def test_an_image_without_a_class_is_refused():
    with pytest.raises(ValueError, match="expected a class from 0 to 9; got -1"):
        load_classification("digits", "test").read_target(-1, "label 0")


def test_what_is_missing_or_broken_is_named(ade20k):
    image = ade20k / "images" / "training" / "ADE_train_00000000.jpg"
    image.write_bytes(image.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"00000000\.jpg can't be decoded"):
        load_segmentation(str(ade20k), "training").read(0)
    with pytest.raises(FileNotFoundError, match="has no split 'validation'.* are: training"):
        load_segmentation(str(ade20k), "validation")
    (ade20k / "annotations" / "training" / "ADE_train_00000001.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 files of .* missing: .*ADE_train_00000001\.png"
    ):
        load_segmentation(str(ade20k), "training")
    with pytest.raises(ValueError, match=r"00000001\.png can't be decoded: .*No such file"):
        load_segmentation(str(ade20k), "training", ReadingArguments(skip_corrupt=True)).read(1)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "no images in the split 'test'"),
        ("only one\n", r"nyu2_test\.csv, line 1: expected `rgb path,depth path` in"),
        ("../other/rgb.png,data/nyu2_test/0.png\n", "line 1: expected"),
        ("/etc/rgb.png,data/nyu2_test/0.png\n", "line 1: expected"),
        ("data/../../rgb.png,data/nyu2_test/0.png\n", "line 1: expected"),
    ],
)
def test_lists_that_are_none_or_lead_elsewhere_are_refused(lines, message, nyuv2):
    (nyuv2 / "data" / "nyu2_test.csv").write_text(lines)
    with pytest.raises(ValueError, match=message):
        load_depth(str(nyuv2), "test")


def write_pairs(folder, targets, *, to="annotations", kind="png"):
    """Images of 4 × 3 pixels beside their targets, in ADE20k's layout."""
    for part in ("images", to):
        (folder / part / "train").mkdir(parents=True)
    for number, target in enumerate(targets):
        Image.new("RGB", (4, 3), (50, 90, 200)).save(folder / "images" / "train" / f"{number}.jpg")
        target.save(folder / to / "train" / f"{number}.{kind}")
    return str(folder)


NAMES = [f"thing {n}" for n in range(11)]


def palette_mask():
    """A mask of the numbers 0 … 11 in a palette."""
    mask = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4), mode="P")
    mask.putpalette([20 * (n % 12) for n in range(36)])
    return mask


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("names.txt", "\n".join(NAMES)),
        ("table.txt", "\n".join(f"{n}\t{name}, of a kind" for n, name in enumerate(NAMES))),
        ("id2label.json", json.dumps(dict(enumerate(NAMES)))),
        ("names.json", json.dumps(NAMES)),
    ],
)
def test_anyones_masks_have_their_own_classes(name, content, tmp_path):
    """Eleven classes, from 0 on, and a label of its own for nothing."""
    folder = write_pairs(tmp_path / "mine", [palette_mask()])
    (tmp_path / name).write_text(content)
    dense = DenseArguments(class_names=str(tmp_path / name), ignore_label=11)
    images = load_segmentation(folder, "train", dense=dense)
    assert images.class_names == NAMES
    assert images.target(0).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 255]]
    shifted = dataclasses.replace(dense, first_label=1)
    target = load_segmentation(folder, "train", dense=shifted).target(0)
    assert target.tolist() == [[255, 0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 255]]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (palette_mask(), r"0\.tif: a mask holds the 11 classes 0 … 10, or 255 for none; got 11"),
        (palette_mask().convert("RGB"), r"a mask has one channel, .*got RGB, \(3, 4, 3\)"),
        (Image.new("L", (2, 2)), "must have the same size; got 3×4 and 2×2"),
        (Image.fromarray(np.full((3, 4), 0.6, np.float32)), "a mask holds whole numbers"),
        (Image.fromarray(np.full((3, 4), np.nan, np.float32)), "a mask holds whole numbers"),
    ],
)
def test_masks_that_are_none_are_refused(mask, message, tmp_path):
    folder = write_pairs(tmp_path / "masks", [mask], kind="tif")
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    dense = DenseArguments(class_names=str(tmp_path / "names.txt"))
    with pytest.raises(ValueError, match=message):
        load_segmentation(folder, "train", dense=dense).read(0)
    (tmp_path / "names.txt").write_text("\n".join(map(str, range(256))))
    with pytest.raises(ValueError, match="at most 255 classes; got 256"):
        load_segmentation(folder, "train", dense=dense)


def test_anyones_depth_has_a_unit(tmp_path):
    metres = np.linspace(0, 5.5, 12, dtype=np.float32).reshape(3, 4)
    kinds = {
        "deep": (Image.fromarray((metres * 4000).astype(np.uint16)), "png", 1 / 4000, 1e-3),
        "shallow": (Image.fromarray((metres * 40).astype(np.uint8)), "png", 1 / 40, 0.03),
        "floats": (Image.fromarray(metres), "tiff", 1.0, 1e-6),
    }
    for name, (image, kind, unit, tolerance) in kinds.items():
        folder = write_pairs(tmp_path / name, [image], to="depths", kind=kind)
        with pytest.raises(ValueError, match="no unit of their own. Give --depth_unit_m"):
            load_depth(folder, "train")
        _, found = load_depth(folder, "train", dense=DenseArguments(depth_unit_m=unit)).read(0)
        np.testing.assert_allclose(found, metres, atol=tolerance)
    unknown = metres.copy()
    unknown[0] = [np.nan, np.inf, 1, 2]
    one = DenseArguments(depth_unit_m=1)
    folder = write_pairs(tmp_path / "u", [Image.fromarray(unknown)], to="depths", kind="tiff")
    assert load_depth(folder, "train", dense=one).read(0)[1][0].tolist() == [0, 0, 1, 2]
    below = write_pairs(tmp_path / "b", [Image.fromarray(-metres)], to="depths", kind="tiff")
    with pytest.raises(ValueError, match=r"depth can't be negative; got -5\.5"):
        load_depth(below, "train", dense=one).read(0)


def test_masks_and_depth_of_the_hub(monkeypatch):
    """Columns of any names; which holds the target is said where there are several."""
    pictures = [Image.new("RGB", (4, 3)), Image.fromarray(np.ones((3, 4), dtype=np.uint8))]
    columns = {"photo": [pictures[0]], "labels": [pictures[1]], "id": [7]}
    features = datasets.Features(
        photo=datasets.Image(), labels=datasets.Image(), id=datasets.Value("int64")
    )
    dataset = datasets.Dataset.from_dict(columns, features=features)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: dataset)
    reading = ReadingArguments(image_column="photo")
    images = load_depth("me/rooms", "train", reading, DenseArguments(depth_unit_m=2))
    assert images.read(0)[1].tolist() == [[2.0] * 4] * 3
    with pytest.raises(ValueError, match="columns of images photo, labels: .*Give --image_column"):
        load_depth("me/rooms", "train", dense=DenseArguments(depth_unit_m=2))
    named = DenseArguments(target_column="id", depth_unit_m=2)
    with pytest.raises(ValueError, match="which holds the images, and which their depth"):
        load_depth("me/rooms", "train", reading, named)


def test_classes_without_pixels_are_named(caplog):
    names = ["other", "road", "sky"]
    check_classes([np.array([[0, 255], [1, 1]])], names, of="roads")
    assert "1 of 3 classes have no pixel: sky" in caplog.text
    # masks of 0 and 255, the number of no class
    with pytest.raises(ValueError, match="no pixel of road, sky.* --ignore_label"):
        check_classes([np.array([[0, 255]]), np.array([[0, 0]])], names, of="roads")


@pytest.mark.parametrize("task", [Segmentation, Depth])
def test_a_dense_loss_is_that_of_its_parts(task, teacher):
    """Of each of four images another share has a target; one has none at all."""
    task = task(teacher.config, 5)
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(task.head_width(teacher.config), 5)
    features = torch.randn(4, 5, 24, generator=generator)
    unknown = 255 if task.name == "segmentation" else 0
    target = torch.randint(1, 5, (4, 8, 8), generator=generator)
    for image, number in enumerate((0, 12, 48, 64)):
        target[image].view(-1)[:number] = unknown
    target = target if task.name == "segmentation" else target.float()

    def loss(rows):
        return task.loss(task.logits(head, features[rows], target[rows]), target[rows])

    parts = 0.25 * loss([0]) + 0.75 * loss([1, 2, 3])
    torch.testing.assert_close(loss([0, 1, 2, 3]), parts)
    assert loss([3]) == 0
    loss([3]).backward()
    assert head.weight.grad.abs().max() == 0

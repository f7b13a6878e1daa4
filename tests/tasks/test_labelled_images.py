import numpy as np
import pytest
from PIL import Image

from raptor_hf.data import ReadingArguments
from raptor_hf.tasks.dense_images import load_depth, load_segmentation, read_depth, read_mask
from raptor_hf.tasks.digit_scenes import digit_scenes
from raptor_hf.tasks.labelled_images import check_pair, load_classification
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
    image, mask = images.read(1)
    assert (image.mode, image.size) == ("RGB", (64, 48))
    expected = np.asarray(digit_scenes("train", 2)[1]["mask"]).astype(int)
    expected[0] = 255
    assert np.array_equal(mask, expected)
    cell = images.cells[1]["mask"]
    with pytest.raises(
        ValueError, match=r"0000001\.png: a mask holds the classes 0 … 9, .* got 10"
    ):
        read_mask(cell, "mask 1", num_classes=10, zero_is_background=True)


def test_ade20k_class_names_are_those_of_its_table(ade20k):
    table = ade20k / "objectInfo150.txt"
    lines = [f"{n}\t0.1\t1\t1\t1\tthing {n}, synonym" for n in range(1, 151)]
    table.write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *lines]))
    assert load_segmentation(str(ade20k), "training").class_names[149] == "thing 150"
    table.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="expected a heading and 150 classes; got 149"):
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
            read_depth(images.cells[0]["depth"], "depth 0", bits=24 - bits)


def test_digit_scenes_come_in_the_same_form():
    _, depth = load_depth("digit_scenes", "test").read(3)
    assert depth.shape == (48, 64) and depth.max() == 10
    images = load_segmentation("digit_scenes", "test")
    _, mask = images.read(3)
    assert (mask == 10).any() and images.class_names[10] == "ground"


def test_images_of_a_folder_of_classes(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("L", (9, 7), 100).save(tmp_path / "val" / name / "0.JPEG")
    images = load_classification(str(tmp_path), "val")
    image, label = images.read(1)
    assert (image.mode, image.size, label) == ("RGB", (9, 7), 1)
    assert images.class_names == ["cat", "dog"]
    (tmp_path / "val" / "dog" / "0.JPEG").write_text("no image")
    with pytest.raises(ValueError, match=r"dog/0\.JPEG can't be decoded"):
        images.read(1)
    with pytest.raises(ValueError, match="expected a class from 0 to 1; got -1"):
        images.read_target(-1, "label 0")


def test_what_is_missing_or_broken_is_named(ade20k, nyuv2):
    image = ade20k / "images" / "training" / "ADE_train_00000000.jpg"
    image.write_bytes(image.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"00000000\.jpg can't be decoded"):
        load_segmentation(str(ade20k), "training").read(0)
    with pytest.raises(
        FileNotFoundError, match="images/validation: no such folder. Expected ADE20k"
    ):
        load_segmentation(str(ade20k), "validation")
    (ade20k / "annotations" / "training" / "ADE_train_00000001.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the files .*ADE_train_00000001\.png"):
        load_segmentation(str(ade20k), "training")
    with pytest.raises(ValueError, match=r"00000001\.png can't be decoded: .*No such file"):
        load_segmentation(str(ade20k), "training", ReadingArguments(skip_corrupt=1)).read(1)
    table = nyuv2 / "data" / "nyu2_test.csv"
    table.write_text(table.read_text() + "only one\n")
    with pytest.raises(ValueError, match=r"nyu2_test\.csv, line 3: expected `rgb path,depth path`"):
        load_depth(str(nyuv2), "test")
    for path in ("../other/rgb.png", "/etc/rgb.png", "data/../../rgb.png"):
        table.write_text(f"{path},data/nyu2_test/0_depth.png\n")
        with pytest.raises(ValueError, match=r"nyu2_test\.csv, line 1: a path leaves"):
            load_depth(str(nyuv2), "test")
    table.write_text("")
    with pytest.raises(ValueError, match="the split is empty"):
        load_depth(str(nyuv2), "test")
    with pytest.raises(ValueError, match="got 4×6 and 6×4"):
        check_pair(Image.new("RGB", (6, 4)), np.zeros((6, 4)), name="row 0")

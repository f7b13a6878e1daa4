import numpy as np
import pytest
from PIL import Image

from raptor_hf.dense_data import (
    check_pair,
    load_depth,
    load_segmentation,
    open_image,
    read_depth,
    read_mask,
)
from raptor_hf.digit_scenes import digit_scenes


@pytest.fixture
def ade20k(tmp_path):
    """Two digit scenes as ADEChallengeData2016: labels 1 … 11, the top row background."""
    for folder in ("images", "annotations"):
        (tmp_path / folder / "training").mkdir(parents=True)
    for number, scene in enumerate(digit_scenes("train", 2)):
        name = f"ADE_train_{number:08d}"
        scene["image"].convert("RGB").save(tmp_path / "images" / "training" / f"{name}.jpg")
        mask = np.asarray(scene["mask"]) + 1
        mask[0] = 0
        path = tmp_path / "annotations" / "training" / f"{name}.png"
        Image.fromarray(mask.astype(np.uint8)).save(path)
    return tmp_path


@pytest.fixture
def nyuv2(tmp_path):
    """Digit scenes as nyu_data: 8 bits for training, 16 for testing."""
    for split in ("train", "test"):
        folder = tmp_path / "data" / f"nyu2_{split}"
        folder.mkdir(parents=True)
        lines = []
        for number, scene in enumerate(digit_scenes(split, 2)):
            scene["image"].convert("RGB").save(folder / f"{number}.jpg")
            depth = np.asarray(scene["depth"])
            if split == "train":
                depth = (depth / 10_000 * 255).round().astype(np.uint8)
            Image.fromarray(depth).save(folder / f"{number}.png")
            names = [f"data/nyu2_{split}/{number}.{kind}" for kind in ("jpg", "png")]
            lines.append(",".join(names))
        (tmp_path / "data" / f"nyu2_{split}.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_ade20k_maps_background_to_ignored(ade20k):
    dataset = load_segmentation(str(ade20k), "training")
    assert len(dataset) == 2
    cell = dataset[1]["mask"]
    mask = read_mask(cell, name="row 1", num_classes=11, zero_is_background=True)
    expected = np.asarray(digit_scenes("train", 2)[1]["mask"]).astype(int)
    expected[0] = 255
    assert np.array_equal(mask, expected)
    check_pair(open_image(dataset[1]["image"], name="row 1"), mask, name="row 1")
    with pytest.raises(
        ValueError, match=r"0000001\.png: a mask holds the classes 0 … 9, .* got 10"
    ):
        read_mask(cell, name="row 1", num_classes=10, zero_is_background=True)


def test_nyuv2_has_two_units_and_both_become_metres(nyuv2):
    for split, bits, tolerance in (("train", 8, 0.02), ("test", 16, 0.0006)):
        dataset = load_depth(str(nyuv2), split)
        expected = np.asarray(digit_scenes(split, 2)[0]["depth"]) / 1000
        depth = read_depth(dataset[0]["depth"], name="row 0", bits=bits)
        assert depth.dtype == np.float32
        np.testing.assert_allclose(depth, expected, atol=tolerance)
        with pytest.raises(
            ValueError, match=rf"0\.png: expected a depth image of {24 - bits} bits"
        ):
            read_depth(dataset[0]["depth"], name="row 0", bits=24 - bits)


def test_digit_scenes_come_in_the_same_form():
    cell = load_depth("digit_scenes", "test")[3]["depth"]
    depth = read_depth(cell, name="row 3", bits=16)
    assert depth.shape == (48, 64) and depth.max() == 10
    cell = load_segmentation("digit_scenes", "test")[3]["mask"]
    mask = read_mask(cell, name="row 3", num_classes=11, zero_is_background=False)
    assert (mask == 10).any() and mask.max() == 10


def test_what_is_missing_or_broken_is_named(ade20k, nyuv2):
    image = ade20k / "images" / "training" / "ADE_train_00000000.jpg"
    image.write_bytes(image.read_bytes()[:300])
    cell = load_segmentation(str(ade20k), "training")[0]["image"]
    with pytest.raises(ValueError, match=r"00000000\.jpg can't be decoded"):
        open_image(cell, name="row 0")
    with pytest.raises(
        FileNotFoundError, match="images/validation: no such folder. Expected ADE20k"
    ):
        load_segmentation(str(ade20k), "validation")
    (ade20k / "annotations" / "training" / "ADE_train_00000001.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the files .*ADE_train_00000001\.png"):
        load_segmentation(str(ade20k), "training")
    table = nyuv2 / "data" / "nyu2_test.csv"
    table.write_text(table.read_text() + "only one\n")
    with pytest.raises(ValueError, match=r"nyu2_test\.csv, line 3: expected `rgb path,depth path`"):
        load_depth(str(nyuv2), "test")
    table.write_text("")
    with pytest.raises(ValueError, match="the split is empty"):
        load_depth(str(nyuv2), "test")
    with pytest.raises(ValueError, match="got 4×6 and 6×4"):
        check_pair(Image.new("RGB", (6, 4)), np.zeros((6, 4)), name="row 0")

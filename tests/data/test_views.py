import io

import datasets
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from raptor_hf.data import ImageViews, keep_batch, load_images, make_processor
from raptor_hf.data.loading import load_digits
from tests.helpers import assert_same_outputs


def test_a_view_depends_on_seed_view_and_image_alone(images):
    alone = images[7]["pixel_values"]  # image 2 in view 1
    batch = images.__getitems__([0, 7, 3])
    assert_same_outputs(batch["pixel_values"][1], alone)  # the affine map is a kernel
    assert batch["image_id"].tolist() == [0, 2, 3]
    assert batch["view"].tolist() == [0, 1, 0]
    assert batch["label"].tolist() == [0, 0, 1]
    plain = images[2]["pixel_values"]
    assert not torch.equal(plain, alone)
    images.seed += 1
    assert not torch.equal(images[7]["pixel_values"], alone)
    assert torch.equal(images[2]["pixel_values"], plain)


def test_batches_lie_where_torch_allocates():
    memory = torch.arange(100.0)
    batch = {"apart": memory[1:9], "own": memory}
    kept = keep_batch(batch)
    assert kept["apart"].data_ptr() % 64 == 0 and torch.equal(kept["apart"], batch["apart"])
    assert kept["own"] is memory


def test_the_first_view_is_the_image_itself(images):
    image = images.read(3, 3)
    plain = images.processor(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(images[3]["pixel_values"], plain)
    images.plain_first = False
    assert not torch.equal(images[3]["pixel_values"], plain)


def test_digits_are_split_without_overlap():
    train, test = load_digits("train"), load_digits("test")
    assert (len(train), len(test)) == (1437, 360)
    pixels = [{image.tobytes() for image in split["image"]} for split in (train, test)]
    assert not pixels[0] & pixels[1]
    counts = torch.bincount(torch.tensor(test["label"]))
    assert counts.min() >= 34
    assert counts.max() <= 38  # stratified
    with pytest.raises(ValueError, match="'train' and 'test'; got 'validation'"):
        load_images("digits", "validation")


def test_processor_round_trip_without_torchvision(tmp_path):
    make_processor(16).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    white = processor(Image.new("RGB", (8, 8), "white"), return_tensors="pt")["pixel_values"]
    assert white.shape == (1, 3, 16, 16)
    torch.testing.assert_close(white[0, 0, 0, 0].item(), (1 - 0.485) / 0.229, rtol=1e-5, atol=1e-5)


def test_a_corrupt_image_is_named():
    good = io.BytesIO()
    Image.new("RGB", (8, 8)).save(good, "png")
    rows = [{"bytes": good.getvalue(), "path": None}, {"bytes": b"not an image", "path": None}]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a"]))
    dataset = datasets.Dataset.from_dict({"image": rows, "label": [0, 0]}, features=features)
    views = ImageViews(dataset, make_processor(8))
    assert views[0]["pixel_values"].shape == (3, 8, 8)
    with pytest.raises(ValueError, match="image 1 of the dataset can't be decoded"):
        views.__getitems__([0, 1])


def test_an_image_folder_works(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "train" / name / "1.png")
    dataset = load_images(str(tmp_path), "train")
    assert dataset.features["label"].names == ["cat", "dog"]
    assert ImageViews(dataset, make_processor(8))[1]["label"] == 1


def test_views_must_be_positive(images):
    with pytest.raises(ValueError, match="at least 1; got 0"):
        ImageViews(images.cells, images.processor, views=0)

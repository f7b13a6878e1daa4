import io

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from raptor_hf.activations.arguments import ImageArguments
from raptor_hf.activations.online import image_views
from raptor_hf.data import ImageViews, ReadingArguments, load_images, make_processor
from raptor_hf.data.arguments import CropArguments
from raptor_hf.data.decoding import look_up, open_image
from raptor_hf.probes.images import ProbeImages
from raptor_hf.tasks.labelled_images import load_classification
from tests.helpers import tiny_teacher

UPRIGHT = {
    1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
    6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip


def picture(width=24, height=16, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, size=(4, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {"path": None, "bytes": file.getvalue()}


def pixels_of(source):
    return np.asarray(open_image(source, name="x", rgb=True))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_all_programs_see_a_photo_upright(kind, tmp_path):
    """Tags 1 to 8 of EXIF, through every reader of the package."""
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    processor = make_processor(8)
    processor.save_pretrained(tmp_path / "teacher")
    plain = encoded(picture(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    folder = tmp_path / "photos" / "test" / "a"
    folder.mkdir(parents=True)
    expected = []
    for tag, turn in UPRIGHT.items():
        exif = Image.Exif()
        exif[0x0112] = tag
        options = {"lossless": True} if kind == "WEBP" else {}
        picture().save(folder / f"{tag}.{kind.lower()}", kind, exif=exif, **options)
        stored = Image.open(io.BytesIO(plain["bytes"])).convert("RGB")
        upright = stored.transpose(Image.Transpose[turn]) if turn else stored
        assert upright.size == ((24, 16) if tag < 5 else (16, 24))
        expected.append(processor(upright, return_tensors="pt")["pixel_values"][0])
    expected, rows = torch.stack(expected), list(range(8))
    photos, reading = str(tmp_path / "photos"), ReadingArguments()
    images = ImageArguments(dataset=photos, split="test")
    dataset = load_images(photos, "test", reading)
    options = (dataset, images, CropArguments(), reading, str(tmp_path / "teacher"))
    extraction = image_views(*options)
    images.views = 2
    online = image_views(*options)
    probe = ProbeImages(load_classification(photos, "test"), processor)
    as_bytes = online.__getitems__(rows)["pixel_values"]
    assert torch.equal(look_up(as_bytes, online.table), expected)
    for reader in (extraction, probe):
        assert torch.equal(reader.__getitems__(rows)["pixel_values"], expected)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("tags", [b"Exif\x00\x00garbage!", b"Exif\x00\x00II*\x00\xff\xff\xff\x7f"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_tags_that_cannot_be_read_are_no_tags(kind, tags):
    plain = pixels_of(encoded(picture(), kind))
    assert np.array_equal(pixels_of(encoded(picture(), kind, exif=tags)), plain)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_greys_of_16_bits_are_scaled(kind):
    eight = np.asarray(picture().convert("L"))
    deep = pixels_of(encoded(Image.fromarray(eight.astype(np.uint16) * 257), kind))
    assert np.array_equal(deep, np.stack([eight] * 3, axis=-1))


def test_greys_of_other_kinds_have_ranges():
    eight = np.asarray(picture().convert("L"))
    rgb = np.stack([eight] * 3, axis=-1)
    of_bytes = eight.astype(np.float32)
    for values in (of_bytes / 255, of_bytes, eight.astype(np.int32), eight.astype(np.int32) * 257):
        assert np.array_equal(pixels_of(encoded(Image.fromarray(values), "TIFF")), rgb)
    for values in (of_bytes - 300, of_bytes * np.nan, eight.astype(np.int32) * 1000):
        with pytest.raises(ValueError, match="x can't be decoded: greys lie in 0 … "):
            pixels_of(encoded(Image.fromarray(values), "TIFF"))


def test_large_images_are_refused_before_they_are_decoded(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match=r"bomb\.png can't be decoded: Image size \(400000000"):
        open_image({"path": str(tmp_path / "bomb.png"), "bytes": None}, name="x")


def test_whatever_is_wrong_the_file_is_named(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "x" * 3_000_000, zip=True)
    picture().save(tmp_path / "text.png", pnginfo=info)
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "words.jpg").write_text("no image")
    for name in ("text.png", "empty.jpg", "words.jpg", "missing.jpg"):
        with pytest.raises(ValueError, match=f"{name} can't be decoded: ."):
            open_image({"path": str(tmp_path / name), "bytes": None}, name="x")
    for cell in (None, {"path": None, "bytes": None}):
        with pytest.raises(ValueError, match="image 3 is empty: there is no image in this row"):
            open_image(cell, name="image 3")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_of_ten_formats_end_no_run(tmp_path):
    """Each of 10,000 is read, or is named by its path."""
    endings = {
        "PNG": "png", "JPEG": "jpg", "WEBP": "webp", "TIFF": "tif", "GIF": "gif", "BMP": "bmp",
        "PPM": "ppm", "TGA": "tga", "JPEG2000": "jp2", "AVIF": "avif",
    }  # fmt: skip
    generator = np.random.default_rng(0)
    for kind, ending in endings.items():
        folder = tmp_path / "train" / kind
        folder.mkdir(parents=True)
        good = encoded(picture(60, 40), kind)["bytes"]
        for number in range(1000):
            damaged = bytearray(good)
            if number % 3 == 0:
                damaged = damaged[: generator.integers(1, len(damaged))]
            else:
                end = len(damaged) if number % 3 == 1 else min(len(damaged), 200)
                for position in generator.integers(0, end, size=generator.integers(1, 8)):
                    damaged[position] = generator.integers(256)
            (folder / f"{number}.{ending}").write_bytes(damaged)
    views = ImageViews(load_images(str(tmp_path), "train"), make_processor(8))
    unreadable = 0
    for image in range(10_000):
        path = views.cells[image]["image"]["path"]
        try:
            assert views.read(image).shape[2] == 3
        except ValueError as error:
            assert str(error).startswith(f"{path} can't be decoded: ")
            unreadable += 1
    assert 2000 < unreadable < 8000

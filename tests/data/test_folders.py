import os

import datasets
import pytest
from PIL import Image

from raptor_hf.data import ImageViews, load_images, make_processor
from raptor_hf.data.folders import image_endings, list_folder
from raptor_hf.data.loading import read_labels


def photo(path, grey=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), grey).save(path, "PNG")
    return path


@pytest.fixture
def tidy(tmp_path):
    for name in ("ant", "bee"):
        photo(tmp_path / "tidy" / "train" / name / "x.png")
    return tmp_path / "tidy"


@pytest.mark.parametrize("name", ["photos[1]", "v1?", "a*b", "größe 蝙蝠 #1"])
def test_names_of_folders_are_no_patterns(tmp_path, name):
    for other in ("photos1", "v10", "aXb"):
        photo(tmp_path / other / "train" / "a" / "x.png", 0)
    photo(tmp_path / name / "train" / "[a-b]" / "x.png", 200)
    images = load_images(str(tmp_path / name), "train")
    assert len(images) == 1 and images[0]["image"].getpixel((0, 0)) == 200
    assert images.features["label"].names == ["[a-b]"]


def test_links_to_folders_and_files_are_followed(tidy, tmp_path):
    photo(tmp_path / "elsewhere" / "cat" / "y.png")
    (tidy / "train" / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    (tidy / "train" / "ant" / "z.png").symlink_to(tmp_path / "elsewhere" / "cat" / "y.png")
    (tmp_path / "whole").symlink_to(tidy)
    (tidy / "val").symlink_to(tidy / "train")
    for folder, split in ((tidy, "train"), (tmp_path / "whole", "val")):
        files, labels, class_names = list_folder(folder, split)
        assert class_names == ["ant", "bee", "cat"] and labels == [0, 0, 1, 2]
        assert files == ["ant/x.png", "ant/z.png", "bee/x.png", "cat/y.png"]


def test_a_cycle_of_links_is_an_error(tidy):
    for link, target in ((tidy / "train" / "loop", tidy), (tidy / "train" / "ant" / "loop", "..")):
        link.symlink_to(target)
        with pytest.raises(ValueError, match=r"loop/?\w* lies too deep"):
            list_folder(tidy, "train")
        link.unlink()


def test_hidden_files_leftovers_and_texts_are_ignored(tidy):
    photo(tidy / "train" / ".ipynb_checkpoints" / "x.png")
    photo(tidy / "train" / "ant" / "._x.png")
    photo(tidy / "train" / "__MACOSX" / "ant" / "x.png")
    (tidy / "train" / "ant" / "Thumbs.db").touch()
    (tidy / "train" / "metadata.csv").write_text("file_name,label\n")
    images = load_images(str(tidy), "train")
    assert len(images) == 2 and images.features["label"].names == ["ant", "bee"]


def test_all_formats_that_pillow_decodes_are_read(tidy):
    for ending in (".PNG", ".JPEG", ".webp", ".Tif", ".avif", ".jp2", ".qoi"):
        assert ending.lower() in image_endings()
        photo(tidy / "train" / "ant" / f"y{ending}")
    assert len(load_images(str(tidy), "train")) == 2 + 7
    assert not {".eps", ".ps", ".pdf", ".h5", ".mpg", ".wmf", ".zip"} & image_endings()


@pytest.mark.parametrize(
    ("path", "split", "error", "word"),
    [
        ("train/stray.png", "train", ValueError, r"train/stray\.png lies beside folders"),
        ("train/ant/deep/x.png", "train", ValueError, r"ant/deep lies too deep"),
        ("train/ant/all.zip", "train", ValueError, r"all\.zip is no image"),
        ("train/ant/y.heic", "train", ValueError, r"y\.heic is no image"),
        ("empty/.hidden", "empty", ValueError, "holds no images"),
        ("test/ant/x.png", "val", FileNotFoundError, "no split 'val'.*: test, train"),
    ],
)
def test_errors_name_the_file(tidy, path, split, error, word):
    photo(tidy / path)
    with pytest.raises(error, match=word):
        load_images(str(tidy), split)


def test_a_name_that_is_neither_a_folder_nor_on_the_hub(tmp_path):
    for name in ("tidi", "a/b/c", str(tmp_path / "tidi"), str(photo(tmp_path / "x.png"))):
        with pytest.raises(FileNotFoundError, match="no such folder, and no such dataset on the"):
            load_images(name, "train")


@pytest.mark.parametrize("path", [b"train/ant/caf\xe9.png", b"train/caf\xe9/x.png"])
def test_names_that_are_not_utf8_are_named(tidy, path):
    photo(tidy / os.fsdecode(path))
    with pytest.raises(ValueError, match=r"caf\\xe9.*names must be UTF-8"):
        load_images(str(tidy), "train")


def test_a_folder_needs_no_classes(tmp_path):
    photo(tmp_path / "flat" / "train" / "x.png")
    photo(tmp_path / "flat" / "train" / "y.png", 255)
    for folder, split in ((tmp_path / "flat", "train"), (tmp_path / "flat" / "train", ".")):
        views = ImageViews(load_images(str(folder), split), make_processor(8))
        batch = views.__getitems__([0, 1])
        assert batch["label"].tolist() == [-1, -1] and views.class_names is None
        assert batch["pixel_values"][0].max() < batch["pixel_values"][1].min()


@pytest.mark.parametrize(
    ("kind", "values", "labels", "names"),
    [
        (datasets.ClassLabel(names=["cat", "dog"]), [1, None, 0], [1, -1, 0], ["cat", "dog"]),
        (datasets.ClassLabel(names=["cat", "dog"]), [1, -1, 0], [1, -1, 0], ["cat", "dog"]),
        (datasets.Value("string"), ["dog", "cat", None], [1, 0, -1], ["cat", "dog"]),
        (datasets.Value("int32"), [3, None, 1], [3, -1, 1], ["0", "1", "2", "3"]),
        (datasets.Value("int64"), [5_000_000, None, 5], [1, -1, 0], ["5", "5000000"]),
        (datasets.Value("int64"), [10**12, 7, 10**12], [1, 0, 1], ["7", "1000000000000"]),
        (datasets.Value("float32"), [0.5, 1.5, 2.5], [-1, -1, -1], None),
    ],
)
def test_labels_are_numbers_words_or_missing(kind, values, labels, names):
    columns = {"image": [Image.new("L", (8, 8))] * 3, "label": values}
    features = datasets.Features(image=datasets.Image(), label=kind)
    rows = datasets.Dataset.from_dict(columns, features=features)
    read, called = read_labels(rows)
    assert read.tolist() == labels and called == names
    batch = ImageViews(rows, make_processor(8)).__getitems__([0, 1, 2])
    assert batch["label"].tolist() == labels

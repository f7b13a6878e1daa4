"""Small folders made of digits, in the layouts that people have the real datasets in."""

import numpy as np
from PIL import Image

from raptor_hf.data.loading import load_digits
from raptor_hf.tasks.digit_scenes import digit_scenes


def enlarged(pixels, size):
    """An image or a map as (height, width) = size, without interpolation."""
    if size is None:
        return Image.fromarray(pixels)
    return Image.fromarray(pixels).resize(size[::-1], Image.Resampling.NEAREST)


def write_imagenet(folder, number=3):
    """`<root>/{train,val}/<wnid>/*.JPEG`: ten classes of as many images, of several sizes."""
    for split, source in (("train", "train"), ("val", "test")):
        digits = load_digits(source)
        labels = np.array(digits["label"])
        for label in range(10):
            path = folder / split / f"n{label:08d}"
            path.mkdir(parents=True)
            for row in np.flatnonzero(labels == label)[:number].tolist():
                image = digits[row]["image"].convert("RGB").resize((40 + row % 20, 50))
                image.save(path / f"{split}_{row}.JPEG")
    return folder


def write_ade20k(folder, splits=("training", "validation"), number=2, size=None):
    """`ADEChallengeData2016`: labels 1 … 11, the top row background."""
    for split in splits:
        for part in ("images", "annotations"):
            (folder / part / split).mkdir(parents=True)
        source = "train" if split == "training" else "test"
        for row, scene in enumerate(digit_scenes(source, number)):
            name = f"ADE_{split[:5]}_{row:08d}"
            image = enlarged(np.asarray(scene["image"]), size)
            image.convert("RGB").save(folder / "images" / split / f"{name}.jpg")
            mask = np.asarray(scene["mask"]) + 1
            mask[0] = 0
            mask = enlarged(mask.astype(np.uint8), size)
            mask.save(folder / "annotations" / split / f"{name}.png")
    lines = [f"{n}\t0.1\t1\t1\t1\tthing {n}, synonym" for n in range(1, 151)]
    table = "\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *lines])
    (folder / "objectInfo150.txt").write_text(table)
    return folder


def write_nyuv2(folder, number=2, size=None):
    """`nyu_data`: depth of 8 bits for training, of 16 for testing."""
    for split in ("train", "test"):
        images = folder / "data" / f"nyu2_{split}"
        images.mkdir(parents=True)
        lines = []
        for row, scene in enumerate(digit_scenes(split, number)):
            image = enlarged(np.asarray(scene["image"]), size)
            image.convert("RGB").save(images / f"{row}.jpg")
            depth = np.asarray(scene["depth"])
            if split == "train":
                depth = (depth / 10_000 * 255).round().astype(np.uint8)
            enlarged(depth, size).save(images / f"{row}.png")
            lines.append(",".join(f"data/nyu2_{split}/{row}.{kind}" for kind in ("jpg", "png")))
        (folder / "data" / f"nyu2_{split}.csv").write_text("\n".join(lines) + "\n")
    return folder

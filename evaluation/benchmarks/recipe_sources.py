"""What recipes are compared on: a teacher, states to learn from, states to report on.

Either the digits as `reproduce.sh digits` leaves them, with stored states; or any teacher and any
dataset of images, whose views are prepared once, as bytes, so that reading them is no part of what
is compared. The teacher computes their states online.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, PreTrainedModel

from raptor_hf.activations.arguments import ImageArguments
from raptor_hf.activations.online import Activations, OnlineActivations, image_views
from raptor_hf.activations.store import load_activations
from raptor_hf.data import ImageViews, ReadingArguments, batches, load_images
from raptor_hf.data.arguments import CropArguments
from raptor_hf.runs.files import read_json, write_json
from raptor_hf.runs.processes import process_state
from raptor_hf.teachers import load_backbone, load_processor
from raptor_hf.teachers.loading import load_teacher_config

_VIEWS = 4  # of every training image
_TEST_IMAGES = 512
_READ_AT_ONCE = 256


class RecipeSource(NamedTuple):
    """What recipes are compared on.

    Args:
        recipe: whose file of `training/recipes` is ours: `<recipe>_raptor.yaml`.
        line: folder of `training/reproduce.sh`: phases, and of the digits all else.
        folder: for what is prepared, and the record of the runs.
        teacher, images: None for the digits.
        splits: of the images, to learn from and to report on.
        resolution: height and width of the images in pixels.
    """

    recipe: str
    line: str
    folder: str
    teacher: str | None = None
    images: str | None = None
    splits: tuple[str, str] = ("train", "val")
    resolution: int | None = None

    def claim_folder(self) -> None:
        """Make the folder for runs on these sources alone.

        Raises:
            ValueError: it holds what was made of another teacher or of other images.
        """
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        path = Path(self.folder) / "source.json"
        facts = json.loads(json.dumps({**self._asdict(), "folder": None}))
        if not path.exists():
            write_json(path, facts)
        elif (before := read_json(path)) != facts:
            changed = [f"{key}: {before.get(key)!r}, now {facts[key]!r}" for key in facts
                       if before.get(key) != facts[key]]  # fmt: skip
            raise ValueError(
                f"{self.folder} holds the runs of another comparison ({'; '.join(changed)}). Give "
                "another --folder."
            )

    def phases(self, k: int) -> list[int]:
        """Return the teacher's phases, k of them."""
        return read_json(Path(self.line) / "phases" / "phases.json")["phases"][str(k)]


def load_config(source: RecipeSource) -> PreTrainedConfig:
    """Return the configuration of the teacher."""
    return load_teacher_config(source.teacher or str(Path(source.line) / "teacher"))


class PreparedImages(Dataset):
    """Views of images that lie on the disk as bytes (n, 3, H, W), mapped into memory.

    Args:
        views: what they were made of; its `table` and `processor` say how models want them.
    """

    def __init__(self, path: Path, views: ImageViews):
        self.pixels = np.load(path, mmap_mode="r")
        self.table, self.processor = views.table, views.processor
        self.public_path = views.public_path

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.from_numpy(self.pixels[rows]), "image_id": torch.tensor(rows)}


def _views(source: RecipeSource, split: str) -> ImageViews:
    """Open the images of a split."""
    training = split == source.splits[0]
    images = ImageArguments(dataset=source.images, split=split, views=_VIEWS if training else 1)
    reading = ReadingArguments(resolution=[source.resolution] if source.resolution else [])
    return image_views(images, CropArguments(), reading, source.teacher, training=True)


def _prepared_file(source: RecipeSource, split: str) -> Path:
    """Return where the views of a split lie."""
    name = f"{Path(source.images).name}_{split}_{source.resolution or 'own'}"
    return Path(source.folder) / f"{name}.npy"


def prepare_images(source: RecipeSource, num_workers: int) -> None:
    """Write the views of all images that are looked at, once.

    Raises:
        ValueError: images that can't be handed over as bytes.
    """
    for split in source.splits if source.images else ():
        path = _prepared_file(source, split)
        if path.exists():
            continue
        views = _views(source, split)
        if views.table is None:
            raise ValueError(f"{source.teacher}: its image processor does more than normalise.")
        number = len(views)
        if split == source.splits[1]:
            number = min(number, _TEST_IMAGES)
        # at equal distances: a folder's images are sorted by class
        rows = np.linspace(0, len(views) - 1, number).astype(int).tolist()
        unfinished, written = path.with_suffix(".unfinished"), 0
        height, width = views.__getitems__([0])["pixel_values"].shape[-2:]
        file = np.lib.format.open_memmap(
            unfinished, mode="w+", dtype=np.uint8, shape=(number, 3, height, width)
        )
        for batch in batches(
            views, _READ_AT_ONCE, f"views of {split}", rows=rows, num_workers=num_workers
        ):
            file[written : written + len(batch["image_id"])] = batch["pixel_values"].numpy()
            written += len(batch["image_id"])
        file.flush()
        os.replace(unfinished, path)


@cache
def open_source(source: RecipeSource) -> tuple[PreTrainedModel, Activations, Activations]:
    """Return the teacher, what is learned from, and what is reported on."""
    if source.images is None:
        folder = Path(source.line)
        teacher = load_backbone(str(folder / "teacher"))
        learned = load_activations(folder / "activations")
        views = ImageViews(load_images("digits", "test"), load_processor(str(folder / "teacher")))
        return teacher, learned, OnlineActivations(teacher, views)
    teacher = load_backbone(source.teacher).to(process_state().device)
    learned, reported = (
        PreparedImages(_prepared_file(source, split), _views(source, split))
        for split in source.splits
    )
    precision = "bfloat16" if teacher.device.type == "cuda" else "float32"
    return (
        teacher,
        OnlineActivations(teacher, learned, precision=precision),
        OnlineActivations(teacher, reported),
    )

"""The images of a probe: which of them train, select and validate heads, and as tensors."""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from ..data.arguments import ReadingArguments
from ..data.decoding import to_pixel_values
from ..data.transforms import Augmentation, resize_pair
from ..data.views import read_or_next
from ..tasks.arguments import DenseArguments
from ..tasks.labelled_images import LabelledImages
from ..tasks.task import TASKS
from .arguments import ProbeArguments

logger = logging.getLogger(__name__)


@dataclass
class ProbeImages(Dataset):
    """Images and targets as tensors. Row r is image r mod n in its view r div n.

    Without an augmentation all views of an image are equal: the processor of the model resizes and
    crops it where it has one label, and it comes whole where every pixel has one.

    Args:
        images: the images and targets of a split.
        processor: the image processor of the model; with an augmentation, and for targets of
            pixels, it only normalises.
        image_ids: the images to take; default: all.
        augmentation: random views; an equal (seed, row) gives an equal view.
        resolution: (height, width) that images with targets of pixels are resized to.
        skip_corrupt: the next image takes the place of one that can't be read.
    """

    images: LabelledImages
    processor: object
    image_ids: np.ndarray | None = None
    augmentation: Augmentation | None = None
    resolution: tuple[int, int] | None = None
    seed: int = 0
    skip_corrupt: bool = False

    def __post_init__(self):
        if self.image_ids is None:
            self.image_ids = np.arange(len(self.images))
        self.image_ids = np.array(self.image_ids)  # of its own: other images take places in it

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Return a batch: `pixel_values` (B, C, H, W), `target` (B,) or (B, H, W), and `image_id`
        (B,).

        Raises:
            ValueError: an image or target that can't be read, or images of several sizes.
        """
        images, targets = zip(*map(self.read, rows), strict=True)
        options = {}
        if self.augmentation is not None or isinstance(targets[0], np.ndarray):
            options = {"do_resize": False, "do_center_crop": False}
        return {
            "pixel_values": to_pixel_values(list(images), self.processor, **options),
            "target": torch.tensor(np.stack(targets)),
            "image_id": torch.tensor(self.image_ids[np.array(rows) % len(self)]),
        }

    def read(self, row: int) -> tuple[np.ndarray, int | np.ndarray]:
        """Return an image (H, W, 3) and its target in the view of a row."""
        view, place = divmod(row, len(self))
        image, target = read_or_next(
            self.images.read, self.image_ids, place, skip_corrupt=self.skip_corrupt
        )
        maps = target if isinstance(target, np.ndarray) else None
        if self.augmentation is not None:
            rng = np.random.default_rng((self.seed, view, int(self.image_ids[place])))
            image, maps = self.augmentation(image, maps, rng)
        elif maps is not None and self.resolution:
            image, maps = resize_pair(image, maps, self.resolution)
        return image, target if maps is None else maps


def load_splits(
    recipe: ProbeArguments,
    dense: DenseArguments,
    reading: ReadingArguments,
    processor,
    *,
    num_heads: int,
    seed: int,
) -> dict[str, ProbeImages]:
    """Load the training and validation images of a recipe and divide them.

    Args:
        num_heads: heads that are trained; one needs no selection.
        seed: of the choice of training images; all seeds are judged on the same images.

    Returns:
        `train`: the images that heads learn from; `selection`: training images that heads never see
        and that select among them; `validation`: the images that results are about.

    Raises:
        ValueError: an empty split, splits with different classes, or too few images.
    """
    load = TASKS[recipe.task].load
    train = load(recipe.dataset, recipe.train_split, reading, dense)
    validation = load(recipe.dataset, recipe.test_split, reading, dense)
    splits = f"{recipe.train_split!r} and {recipe.test_split!r}"
    if train.class_names != validation.class_names:
        differing = sorted(set(train.class_names) ^ set(validation.class_names))
        raise ValueError(
            f"{recipe.dataset}: the splits {splits} must have the same classes in the same order; "
            f"only in one of them: {', '.join(differing[:5]) or 'none'}."
        )
    if recipe.train_split == recipe.test_split:
        logger.warning("The heads are judged on the images that they learn from: %s.", splits)

    # a share of the training images selects, if there is something to select
    rows = np.random.default_rng(seed).permutation(len(train))[: recipe.train_images or None]
    number = max(1, round(recipe.held_out * len(rows))) if num_heads > 1 else 0
    if number >= len(rows):
        raise ValueError(
            f"{num_heads} heads need at least two training images, one to learn from and one to "
            f"select with; {recipe.dataset} ({recipe.train_split}) has {len(rows)}."
        )
    judged = np.random.default_rng(0).permutation(len(validation))[: recipe.test_images or None]
    options = {"resolution": tuple(reading.resolution) or None}
    options["skip_corrupt"] = reading.skip_corrupt
    return {
        "train": ProbeImages(train, processor, np.sort(rows[number:]), **options),
        "selection": ProbeImages(train, processor, np.sort(rows[:number]), **options),
        "validation": ProbeImages(validation, processor, np.sort(judged), **options),
    }

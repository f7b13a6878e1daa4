"""What a recipe asks for: the images of every backbone that is judged, the task, the heads."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, PreTrainedModel

from ..data.arguments import CropArguments, ReadingArguments
from ..data.transforms import Augmentation
from ..data.views import skip_corrupt
from ..loop.arguments import LoopArguments
from ..runs.files import Fingerprint
from ..tasks.arguments import DenseArguments
from ..tasks.labelled_images import LabelledImages
from ..tasks.task import TASKS, Depth, Task
from ..teachers import image_size
from .arguments import ProbeArguments
from .features import StoredFeatures, store_features
from .images import ProbeImages


@dataclass
class ProbeData:
    """Images for the heads of one backbone.

    Args:
        train: gives `features`, or `pixel_values` in random views.
        selection: features of those of them that heads are selected on; None without a grid.
        validation: features of the images that results are about.
        neighbours: features of training images as they are, for k-NN; None where there are none.
    """

    train: Dataset
    selection: StoredFeatures | None
    validation: StoredFeatures
    neighbours: StoredFeatures | None


def choose(number: int, at_most: int, seed: int) -> np.ndarray:
    """Return the row numbers in random order; all of them where `at_most` is 0."""
    return np.random.default_rng(seed).permutation(number)[: at_most or None]


class Candidate(NamedTuple):
    """A head of the grid."""

    learning_rate: float
    pooling: str

    def __str__(self) -> str:
        return f"{self.learning_rate:g} {self.pooling}"


def head_grid(
    recipe: ProbeArguments, loop: LoopArguments, task: Task | type[Task]
) -> list[Candidate]:
    """Return the grid of heads that a recipe asks for; a head that is only judged is no grid.

    Raises:
        ValueError: a pooling that the task doesn't have.
    """
    poolings = recipe.poolings or task.poolings[:1]
    unknown = set(poolings) - set(task.poolings)
    if unknown:
        raise ValueError(
            f"poolings of {task.name} are {', '.join(task.poolings)}; got {sorted(unknown)}."
        )
    grid = recipe.learning_rate_grid if loop.steps != 0 else [1.0]
    return [Candidate(f * loop.learning_rate, p) for p in poolings for f in grid]


def make_task(
    recipe: ProbeArguments, config: PreTrainedConfig, class_names: list[str] | None
) -> Task:
    """Make the task of a recipe for a backbone of this configuration."""
    if recipe.task != "depth":
        return TASKS[recipe.task](config, len(class_names))
    limits = {"min_depth": recipe.min_depth, "max_depth": recipe.max_depth}
    return Depth(config, recipe.depth_bins, **limits, eval_crop=recipe.eval_crop or None)


class ProbeImageSets:
    """The training and validation images of a recipe, the same for every model that is judged.

    Args:
        task: whose `load` reads them.
        processor: the teacher's; all models get the same images.

    Raises:
        ValueError: an empty split, or splits with different classes.
    """

    def __init__(
        self,
        recipe: ProbeArguments,
        crops: CropArguments,
        dense: DenseArguments,
        reading: ReadingArguments,
        loop: LoopArguments,
        task: type[Task],
        processor,
    ):
        self.recipe, self.crops, self.reading, self.loop = recipe, crops, reading, loop
        self.processor = processor
        self.train, self.validation = (
            task.load(recipe.dataset, split, reading, dense)
            for split in (recipe.train_split, recipe.test_split)
        )
        if self.train.class_names != self.validation.class_names:
            differing = set(self.train.class_names) ^ set(self.validation.class_names)
            raise ValueError(
                f"{recipe.dataset}: the splits {recipe.train_split!r} and "
                f"{recipe.test_split!r} must have the same classes in the same order; only "
                f"in one of them: {', '.join(sorted(differing)[:5]) or 'none'}."
            )
        rows = choose(len(self.train), recipe.train_images, loop.seed)
        self.grid = len(head_grid(recipe, loop, task)) > 1
        # without a grid there is nothing to select
        held_out = max(1, round(recipe.held_out * len(rows))) if self.grid else 0
        self.train_rows, self.selection_rows = np.sort(rows), np.sort(rows[:held_out])
        # not of the run's seed: all seeds are judged on the same images
        self.validation_rows = np.sort(choose(len(self.validation), recipe.test_images, 0))

    def files(self) -> dict[str, Fingerprint]:
        """Return which images these are, as a part of what a run is."""
        return {"train_images": self.train.files, "test_images": self.validation.files}

    def plain(self, images: LabelledImages, rows: np.ndarray | None = None) -> ProbeImages:
        """Return images as they are judged, without random views."""
        plain = ProbeImages(
            images,
            self.processor,
            rows=rows,
            resolution=tuple(self.reading.resolution) or None,
        )
        return skip_corrupt(plain, self.reading.skip_corrupt)

    def data(self, backbone: PreTrainedModel, task: Task, folder: Path) -> ProbeData:
        """Return the images for the heads of one backbone; features are stored where there are no
        crops.

        Args:
            folder: for the features.
        """
        recipe = self.recipe
        size = tuple(self.reading.resolution) or image_size(self.processor)
        augmentation = Augmentation.of(self.crops, size)

        def store(images: LabelledImages, rows=None) -> StoredFeatures:
            plain = self.plain(images, rows)
            return store_features(
                folder,
                backbone,
                task,
                plain,
                batch_size=recipe.eval_batch_size,
                num_workers=self.loop.num_workers,
            )

        has_neighbours = task.name == "classification" and recipe.knn_images > 0
        selection = neighbours = None
        if augmentation is None:
            train = store(self.train, self.train_rows)
            selection = train.subset(self.selection_rows) if self.grid else None
        else:
            train = ProbeImages(
                self.train,
                self.processor,
                rows=self.train_rows,
                augmentation=augmentation,
                seed=self.loop.seed,
            )
            train = skip_corrupt(train, self.reading.skip_corrupt, replace=True)
            selection = store(self.train, self.selection_rows) if self.grid else None
        if has_neighbours:
            step = math.ceil(len(self.train_rows) / recipe.knn_images)
            rows = self.train_rows[::step]
            neighbours = store(self.train, rows) if augmentation else train.subset(rows)
        return ProbeData(train, selection, store(self.validation, self.validation_rows), neighbours)

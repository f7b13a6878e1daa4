"""The training and validation images of a recipe, for every backbone that is judged."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from ..tasks.labelled_images import LabelledImages
from ..tasks.task import Task
from .arguments import ProbeArguments, candidates_of
from .features import StoredFeatures, store_features
from .images import ProbeImages


@dataclass
class ProbeData:
    """Images for the heads of one backbone.

    Args:
        train: gives `features`, or `pixel_values` in random views.
        selection: features of those of them that heads are selected on; None without a grid.
        validation: features of the images that results are about.
        voters: features of training images as they are, for k-NN; None where there are none.
    """

    train: Dataset
    selection: StoredFeatures | None
    validation: StoredFeatures
    voters: StoredFeatures | None


def choose(number: int, at_most: int, seed: int) -> np.ndarray:
    """Row numbers in random order; all of them where `at_most` is 0."""
    return np.random.default_rng(seed).permutation(number)[: at_most or None]


class ProbeImageSets:
    """The training and validation images of a recipe, the same for every model that is judged.

    Args:
        task: whose `load` reads them.
        processor: the teacher's; all models get the same images.

    Raises:
        ValueError: an empty split, or splits with different classes.
    """

    def __init__(self, arguments: ProbeArguments, task: type[Task], processor):
        self.arguments, self.processor = arguments, processor
        missing_ok = arguments.skip_corrupt > 0
        self.train, self.validation = (
            task.load(arguments.dataset, split, missing_ok=missing_ok)
            for split in (arguments.train_split, arguments.test_split)
        )
        if self.train.class_names != self.validation.class_names:
            differing = set(self.train.class_names) ^ set(self.validation.class_names)
            raise ValueError(
                f"{arguments.dataset}: the splits {arguments.train_split!r} and "
                f"{arguments.test_split!r} must have the same classes in the same order; only "
                f"in one of them: {', '.join(sorted(differing)[:5]) or 'none'}."
            )
        rows = choose(len(self.train), arguments.train_images, arguments.seed)
        self.grid = len(candidates_of(arguments, task)) > 1
        # without a grid there is nothing to select
        held_out = max(1, round(arguments.held_out * len(rows))) if self.grid else 0
        self.train_rows, self.selection_rows = np.sort(rows), np.sort(rows[:held_out])
        # not of the run's seed: all seeds are judged on the same images
        self.validation_rows = np.sort(choose(len(self.validation), arguments.test_images, 0))

    def plain(self, images: LabelledImages, rows: np.ndarray | None = None) -> ProbeImages:
        """Images as they are judged, without random views."""
        arguments = self.arguments
        return ProbeImages(
            images,
            self.processor,
            rows=rows,
            resolution=tuple(arguments.resolution) or None,
            skip_corrupt=arguments.skip_corrupt,
        )

    def data(self, backbone: PreTrainedModel, task: Task, folder: Path) -> ProbeData:
        """The images for the heads of one backbone; features are stored where there are no crops.

        Args:
            folder: for the features.
        """
        arguments, augmentation = self.arguments, self.arguments.augmentation()

        def store(images: LabelledImages, rows=None) -> StoredFeatures:
            plain = self.plain(images, rows)
            batch_size = arguments.eval_batch_size
            return store_features(folder, backbone, task, plain, batch_size=batch_size)

        voting = task.name == "classification" and arguments.knn_images > 0
        selection = voters = None
        if augmentation is None:
            train = store(self.train, self.train_rows)
            selection = train.subset(self.selection_rows) if self.grid else None
        else:
            train = ProbeImages(
                self.train,
                self.processor,
                rows=self.train_rows,
                augmentation=augmentation,
                seed=arguments.seed,
                skip_corrupt=arguments.skip_corrupt,
            )
            selection = store(self.train, self.selection_rows) if self.grid else None
        if voting:
            step = math.ceil(len(self.train_rows) / arguments.knn_images)
            rows = self.train_rows[::step]
            voters = store(self.train, rows) if augmentation else train.subset(rows)
        return ProbeData(train, selection, store(self.validation, self.validation_rows), voters)

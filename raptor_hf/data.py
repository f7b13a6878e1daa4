"""Image datasets and their views; a view is a function of (seed, view, image) alone."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import BitImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from .runs.processes import process_state, progress_bar

_TORCH_ALIGNMENT = 64  # bytes: torch allocates at multiples of it


def load_images(name: str, split: str) -> datasets.Dataset:
    """Load a labelled image dataset with the columns `image` and `label`.

    Args:
        name: `"digits"` (embedded), a folder `<name>/<split>/<class>/<image>`, or a Hub dataset id.
        split: `"train"`, `"test"`, or what the dataset calls its splits.

    Raises:
        ValueError: the columns are missing.
    """
    if name == "digits":
        return load_digits(split)
    if Path(name).is_dir():
        # with data_dir, folders called val or test would give splits of other names
        files = {"train": str(Path(name) / split / "**")}
        dataset = datasets.load_dataset("imagefolder", data_files=files, split="train")
    else:
        dataset = datasets.load_dataset(name, split=split)
    if not {"image", "label"} <= set(dataset.column_names):
        raise ValueError(
            f"{name} must have the columns 'image' and 'label'; it has {dataset.column_names}."
        )
    return dataset


def load_digits(split: str) -> datasets.Dataset:
    """Load scikit-learn's 1,797 handwritten digits (8×8 pixels): 1,437 to train, 360 to test."""
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    images, labels = sklearn_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    train, test = train_test_split(
        np.arange(len(images)), test_size=0.2, stratify=labels, random_state=0
    )
    rows = {"train": train, "test": test}
    if split not in rows:
        raise ValueError(f"The digits have the splits 'train' and 'test'; got {split!r}.")
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[str(digit) for digit in range(10)])
    )
    columns = {"image": list(images[rows[split]]), "label": labels[rows[split]].tolist()}
    return datasets.Dataset.from_dict(columns, features=features)


def make_processor(image_size: int) -> BitImageProcessorPil:
    """Return DINOv2's preprocessing at any size: bicubic resize, centre crop, ImageNet mean."""
    return BitImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        resample=PILImageResampling.BICUBIC,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )


def _affine_views(pixel_values: torch.Tensor, keys: list[tuple[int, ...]]) -> torch.Tensor:
    """Rotate (±15°), scale (±15 %) and shift (±10 %) every image (B, C, H, W) at random.

    Args:
        keys: one tuple of integers an image; equal keys give equal views.
    """
    draws = np.stack([np.random.default_rng(key).uniform(-1, 1, size=4) for key in keys])
    angle, scale = np.deg2rad(15) * draws[:, 0], 1 + 0.15 * draws[:, 1]
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    shift_x, shift_y = 0.2 * draws[:, 2], 0.2 * draws[:, 3]  # the image spans 2 units
    theta = np.stack([cos, -sin, shift_x, sin, cos, shift_y], axis=1).reshape(-1, 2, 3)
    theta = torch.as_tensor(theta, dtype=pixel_values.dtype)
    grid = functional.affine_grid(theta, list(pixel_values.shape), align_corners=False)
    return functional.grid_sample(pixel_values, grid, padding_mode="border", align_corners=False)


class ImageViews(Dataset):
    """A labelled image dataset, each image in several views, as tensors ready for a model.

    View 0 is the image itself, the others are random small affine maps of it. Row r is the image
    r mod n of those that are taken, in view r div n; a row beyond the last is one view more.

    Args:
        dataset: columns `image` and `label`.
        processor: the teacher's image processor.
        views: number of views per image.
        seed: other seeds, other views.
        plain_first: False makes view 0 a random one too (for training).
        image_ids: which images to take; default: all. A view of an image does not depend on it.
    """

    def __init__(
        self,
        dataset,
        processor,
        *,
        views: int = 1,
        seed: int = 0,
        plain_first: bool = True,
        image_ids: np.ndarray | None = None,
    ):
        if views < 1:
            raise ValueError(f"views must be at least 1; got {views}.")
        self.processor = processor
        self.views, self.seed, self.plain_first = views, seed, plain_first
        self.images, self.labels = dataset.select_columns("image"), torch.tensor(dataset["label"])
        self.image_ids = np.arange(len(self.labels)) if image_ids is None else image_ids

    def __len__(self) -> int:
        return self.views * len(self.image_ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {name: values[0] for name, values in self.__getitems__([row]).items()}

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Return a batch: `pixel_values` (B, C, H, W), and `label`, `image_id`, `view` (B,)
        each.
        """
        image_ids = [int(self.image_ids[row % len(self.image_ids)]) for row in rows]
        views = [row // len(self.image_ids) for row in rows]
        pixel_values = self.processor(self._read(image_ids), return_tensors="pt")["pixel_values"]
        moved = [i for i, view in enumerate(views) if view > 0 or not self.plain_first]
        if moved:
            keys = [(self.seed, views[i], image_ids[i]) for i in moved]
            pixel_values[moved] = _affine_views(pixel_values[moved], keys)
        return {
            "pixel_values": pixel_values,
            "label": self.labels[image_ids],
            "image_id": torch.tensor(image_ids),
            "view": torch.tensor(views),
        }

    def _read(self, image_ids: list[int]) -> list:
        """Decode images; an error names an unreadable one."""
        try:
            return [image.convert("RGB") for image in self.images[image_ids]["image"]]
        except OSError:  # what PIL raises for unknown and for truncated images
            for image_id in image_ids:
                try:
                    self.images[image_id]["image"].convert("RGB")
                except OSError as error:
                    raise ValueError(
                        f"Image {image_id} of the dataset can't be decoded: {error}"
                    ) from error
            raise


def keep_batch(batch: dict) -> dict:
    """Collate function for datasets that hand out whole batches (`__getitems__`).

    A tensor around memory of numpy lies at another address in every run. Kernels choose their way
    by the address, so it is copied to where torch allocates: equal batches give equal outputs.
    """
    return {
        name: values.clone() if values.data_ptr() % _TORCH_ALIGNMENT else values
        for name, values in batch.items()
    }


def batches(
    dataset: Dataset,
    batch_size: int,
    description: str,
    *,
    rows: Sequence[int] | None = None,
    num_workers: int = 0,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield this process' share of a dataset in whole batches, with a progress bar.

    Args:
        rows: which rows, in their order; default: all. The last batch is as ragged as it comes.
        num_workers: processes that read ahead.
    """
    state = process_state()
    rows = range(len(dataset)) if rows is None else rows
    starts = range(state.process_index * batch_size, len(rows), state.num_processes * batch_size)
    shares = [list(rows[start : start + batch_size]) for start in starts]
    loader = DataLoader(
        dataset, batch_sampler=shares, collate_fn=keep_batch, num_workers=num_workers
    )
    total = sum(map(len, shares))
    with progress_bar(description, total, unit="image", enabled=state.is_main_process) as bar:
        for share, batch in zip(shares, loader, strict=True):
            yield batch
            bar.update(len(share))


def choose_images(number: int, wanted: int | None, seed: int) -> np.ndarray:
    """Return which of so many images are looked at: all, or some at random, in order.

    Raises:
        ValueError: more are wanted than there are.
    """
    if wanted is None:
        return np.arange(number)
    if not 1 <= wanted <= number:
        raise ValueError(f"num_images must lie between 1 and {number:,}; got {wanted:,}.")
    return np.sort(np.random.default_rng(seed).permutation(number)[:wanted])

"""Metrics of the `evaluate` library that need no network and are fed with sufficient statistics.

Each stands beside the function that makes its rows; `compute_over_processes` feeds it.
"""

import datasets
import evaluate
import numpy as np
import torch
from accelerate.utils import gather_object

# a variance below this share of the mean square is rounding: the states are equal
_ROUNDING = 1e-12
_INT, _FLOAT = datasets.Value("int64"), datasets.Value("float64")


class _Metric(evaluate.Metric):
    """A metric that makes no folder in the user's cache if it is kept in memory.

    `rows` names the columns of `add_batch`.
    """

    rows: dict

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="sufficient statistics: " + ", ".join(self.rows),
            features=datasets.Features(self.rows),
        )

    def _build_data_dir(self) -> str:
        return self._data_dir_root if self.keep_in_memory else super()._build_data_dir()


def compute_over_processes(metric: type[evaluate.Metric], batches: list[dict[str, list]]) -> dict:
    """Compute a metric over the statistics of all processes; each gets the result.

    Args:
        metric: its class.
        batches: rows of this process for `add_batch`, in any number: nothing counts twice.
    """
    in_memory = metric(keep_in_memory=True)
    for batch in gather_object(batches):
        in_memory.add_batch(**batch)
    return in_memory.compute()


class Accuracy(_Metric):
    """Share of right predictions, `accuracy` (top 1) and `top5`, each in [0, 1].

    Feed it `label_ranks`: one integer an image.
    """

    rows = {"rank": _INT}

    def _compute(self, rank) -> dict[str, float]:
        rank = np.asarray(rank)
        return {"accuracy": float(np.mean(rank < 1)), "top5": float(np.mean(rank < 5))}


def label_ranks(*, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, list[int]]:
    """Return rows for `Accuracy.add_batch`: how many classes come before the right one, 0 for none.

    Of equal logits the lower class comes first, as in `argmax`.

    Args:
        logits: (B, classes).
        labels: (B,) classes.

    Raises:
        ValueError: a label that is no class.
    """
    _check_labels(labels, logits.shape[1])
    of_label = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    before = (logits > of_label) | ((logits == of_label) & earlier)
    return {"rank": before.sum(dim=1).tolist()}


class MeanIoU(_Metric):
    """Intersection over union of every class, pooled over all images, and its mean `miou`.

    A class that neither occurs nor is predicted has no IoU (None in `iou`) and is left out of the
    mean. Feed it rows from `segmentation_statistics`, one an image.
    """

    rows = dict.fromkeys(("intersection", "predicted", "target"), datasets.List(_INT))

    def _compute(self, intersection, predicted, target) -> dict:
        """Return `miou`, `pixel_accuracy` in [0, 1], and `iou`, a list over classes."""
        hits = np.sum(intersection, axis=0)
        named, there = np.sum(predicted, axis=0), np.sum(target, axis=0)
        if not there.sum():
            raise ValueError("No pixel is labelled: all are ignored, there is no IoU.")

        # a class that neither occurs nor is predicted has no union
        union = (named + there - hits).astype(float)
        iou = np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)
        return {
            "miou": float(np.nanmean(iou)),
            "pixel_accuracy": float(hits.sum() / there.sum()),
            "iou": _none_for_nan(iou),
        }


def _none_for_nan(values: np.ndarray) -> list[float | None]:
    """Return figures (n,) as JSON knows them."""
    return [None if np.isnan(value) else value for value in values.tolist()]


def segmentation_statistics(
    *, prediction: torch.Tensor, target: torch.Tensor, num_classes: int, ignore_index: int = 255
) -> dict[str, list[list[int]]]:
    """Return rows for `MeanIoU.add_batch`: pixels per class of every image.

    Args:
        prediction: (B, H, W) classes.
        target: (B, H, W) classes; pixels of `ignore_index` are not counted.

    Raises:
        ValueError: different shapes, or a class that is not one of `num_classes`.
    """
    _check_shapes(prediction, target)
    rows: dict[str, list] = {name: [] for name in MeanIoU.rows}
    for named, there in zip(prediction, target, strict=True):
        counted = there != ignore_index
        named, there = named[counted], there[counted]
        counts = {"intersection": there[named == there], "predicted": named, "target": there}
        for name, labels in counts.items():
            _check_labels(labels, num_classes)
            rows[name].append(torch.bincount(labels, minlength=num_classes).tolist())
    return rows


_DEPTH_SUMS = ("squared_error", "relative_error", "log10_error", "delta1", "delta2", "delta3")


class DepthError(_Metric):
    """The usual figures of depth estimation, pooled over all valid pixels of all images.

    Feed it rows from `depth_statistics`, one an image.
    """

    rows = {"count": _INT}
    rows |= {name: _FLOAT for name in _DEPTH_SUMS}

    def _compute(self, count, **sums) -> dict[str, float]:
        """Return errors, and shares of pixels that are nearly right.

        `rmse_m` in metres; `abs_rel`, |error| as a share of the depth; `log10`, |error| of log₁₀;
        `delta1`, `delta2`, `delta3`: the share of pixels where the larger of prediction and depth
        is less than 1.25, 1.25², 1.25³ times the smaller.
        """
        number = np.sum(count)
        if not number:
            raise ValueError("No pixel has a valid depth: there is no depth error.")
        means = {name: float(np.sum(sums[name]) / number) for name in _DEPTH_SUMS}
        return {
            "rmse_m": means.pop("squared_error") ** 0.5,
            "abs_rel": means.pop("relative_error"),
            "log10": means.pop("log10_error"),
            **means,
        }


def depth_statistics(
    *, prediction: torch.Tensor, target: torch.Tensor, valid: torch.Tensor
) -> dict[str, list]:
    """Return rows for `DepthError.add_batch`: sums over the valid pixels of every image.

    Args:
        prediction, target: (B, H, W), metres, positive where they count.
        valid: (B, H, W), True where a pixel counts.

    Raises:
        ValueError: different shapes.
    """
    _check_shapes(prediction, target)
    count = valid.sum(dim=(1, 2))
    # pixels that don't count must not make NaN: there both are 1 m
    prediction = torch.where(valid, prediction, 1.0).double()
    target = torch.where(valid, target, 1.0).double()
    ratio = torch.maximum(prediction / target, target / prediction)
    maps = {
        "squared_error": (prediction - target).square(),
        "relative_error": (prediction - target).abs() / target,
        "log10_error": (prediction.log10() - target.log10()).abs(),
        **{f"delta{n}": valid & (ratio < 1.25**n) for n in (1, 2, 3)},
    }
    sums = {name: values.double().sum(dim=(1, 2)).tolist() for name, values in maps.items()}
    return {"count": count.tolist(), **sums}


class RSquared(_Metric):
    """R² of states, per layer and token group: 1 − Σ(â − a)² / Σ(a − ā)².

    ā is the mean of each channel over images and tokens of that layer and group. `all` pools the
    groups: errors and variances around the groups' own means are summed over them. Feed it rows
    from `state_statistics`; how the images are split into batches makes no difference. A group
    without variance has no R², and is left out of `all`.
    """

    rows = {
        "layer": _INT,
        "group": datasets.Value("string"),
        "count": _INT,
        "squared_error": _FLOAT,
        "target_square": _FLOAT,
        "target_sum": datasets.List(_FLOAT),
    }

    def _compute(self, layer, group, count, squared_error, target_square, target_sum) -> dict:
        """Return `layers`: group to a list over layers 1 … L; `mean`: group to the mean over
        layers. None stands where the target has no variance, as the cls token of a single image.
        """
        # sums over batches, by layer and group
        depths, row = np.unique(layer, return_inverse=True)
        names, column = np.unique(group, return_inverse=True)
        sums = np.zeros((3, len(depths), len(names)))
        np.add.at(sums, (slice(None), row, column), [count, squared_error, target_square])
        totals = np.zeros((len(depths), len(names), len(target_sum[0])))
        np.add.at(totals, (row, column), target_sum)

        # errors and variances of all groups that have a variance, and of each
        number, error, square = sums
        variance = square - np.square(totals).sum(axis=-1) / number
        parts = np.where(variance > _ROUNDING * square, [error, variance], np.nan)
        pooled = np.nansum(parts, axis=-1, keepdims=True)
        pooled[:, pooled[1] == 0] = np.nan
        error, variance = np.concatenate([pooled, parts], axis=-1)

        # by name, None where there is no variance
        layers, means = {}, {}
        for name, scores in zip(["all", *names.tolist()], (1 - error / variance).T, strict=True):
            layers[name], means[name] = _none_for_nan(scores), None
            there = scores[~np.isnan(scores)]
            if len(there):
                means[name] = float(there.mean())
        return {"layers": layers, "mean": means}


def r2_reference(*, prediction: torch.Tensor, target: torch.Tensor) -> float:
    """Return R² of a batch as the reference code works it out, for comparison only.

    1 − Σ(â − a)² / Σ(â − m)², with m one scalar mean over all entries of the *prediction*: layers,
    tokens and channels are pooled (so the states with the largest norms decide), layer 0 is
    included (it is equal by construction), and the denominator is not the teacher's variance. The
    published evaluation averages it over batches of 64 images.

    Args:
        prediction, target: (B, L + 1, N, D), trajectories of a student and its teacher.

    Raises:
        ValueError: different shapes.
    """
    _check_shapes(prediction, target)
    prediction, target = prediction.double(), target.double()
    error = (prediction - target).square().sum()
    return float(1 - error / (prediction - prediction.mean()).square().sum())


def state_statistics(
    *, prediction: torch.Tensor, target: torch.Tensor, groups: dict[str, slice]
) -> dict[str, list]:
    """Return rows for `RSquared.add_batch`: one per layer 1 … L and token group.

    Args:
        prediction, target: (B, L + 1, N, D), trajectories of a student and its teacher; layer 0 is
            equal by construction and left out.
        groups: token groups (`TokenLayout.groups`).

    Raises:
        ValueError: different shapes.
    """
    _check_shapes(prediction, target)
    rows: dict[str, list] = {name: [] for name in RSquared.rows}
    for name, tokens in groups.items():
        # layer by layer: doubles of all at once would take long, and much memory
        for layer in range(1, target.shape[1]):
            states = target[:, layer, tokens].double()
            error = prediction[:, layer, tokens].double() - states
            rows["layer"].append(layer)
            rows["group"].append(name)
            rows["count"].append(states.shape[0] * states.shape[1])
            rows["squared_error"].append(error.square().sum())
            rows["target_square"].append(states.square().sum())
            rows["target_sum"].append(states.sum(dim=(0, 1)))
    for name in ("squared_error", "target_square", "target_sum"):
        rows[name] = torch.stack(rows[name]).tolist()
    return rows


def _check_labels(labels: torch.Tensor, num_classes: int) -> None:
    """Refuse labels that are no class."""
    if labels.numel() and (labels.min() < 0 or labels.max() >= num_classes):
        given = f"{int(labels.min())} … {int(labels.max())}"
        raise ValueError(f"Labels must be classes from 0 to {num_classes - 1}; got {given}.")


def _check_shapes(prediction: torch.Tensor, target: torch.Tensor) -> None:
    """Refuse a prediction and a target of different shapes."""
    if prediction.shape != target.shape:
        shapes = f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        raise ValueError(f"Prediction and target must have the same shape; got {shapes}.")

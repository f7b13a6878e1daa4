"""Metrics of the `evaluate` library that need no network and are fed with sufficient statistics.

Instantiate them directly, with `keep_in_memory=True` where no cache file is wanted.
"""

import datasets
import evaluate
import numpy as np
import torch


class Accuracy(evaluate.Metric):
    """Share of correct predictions, `accuracy` in [0, 1]."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description="Share of predictions that equal the reference.",
            citation="",
            inputs_description="predictions and references: class indices, one an image",
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class RSquared(evaluate.Metric):
    """R² of states, per layer and token group: 1 − Σ(â − a)² / Σ(a − ā)².

    ā is the mean of each channel over images and tokens of that layer and group. `all` pools the
    groups: errors and variances around the groups' own means are summed over them. Feed it rows
    from `state_statistics`; how the images are split into batches makes no difference.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            layer=datasets.Value("int64"),
            group=datasets.Value("string"),
            count=datasets.Value("int64"),
            squared_error=datasets.Value("float64"),
            target_square=datasets.Value("float64"),
            target_sum=datasets.List(datasets.Value("float64")),
        )
        return evaluate.MetricInfo(
            description="Coefficient of determination of a student's states.",
            citation="",
            inputs_description="one row per batch, layer and token group, from state_statistics",
            features=features,
        )

    def _compute(self, layer, group, count, squared_error, target_square, target_sum) -> dict:
        """`layers`: group to a list over layers 1 … L; `mean`: group to the mean over layers."""
        errors, variances = {}, {}
        for key in sorted(set(zip(group, layer, strict=True))):
            rows = [i for i, row in enumerate(zip(group, layer, strict=True)) if row == key]
            total = np.sum([target_sum[i] for i in rows], axis=0)
            spread = sum(target_square[i] for i in rows)
            spread -= float(total @ total) / sum(count[i] for i in rows)
            for name in (key[0], "all"):
                errors.setdefault((name, key[1]), 0.0)
                variances.setdefault((name, key[1]), 0.0)
                errors[name, key[1]] += sum(squared_error[i] for i in rows)
                variances[name, key[1]] += spread
        layers: dict[str, list[float]] = {}
        for name, depth in sorted(errors):
            layers.setdefault(name, []).append(1 - errors[name, depth] / variances[name, depth])
        return {"layers": layers, "mean": {name: float(np.mean(r2)) for name, r2 in layers.items()}}


def r2_reference(*, prediction: torch.Tensor, target: torch.Tensor) -> float:
    """R² of one batch of trajectories as the reference code works it out, for comparison only.

    1 − Σ(â − a)² / Σ(â − m)², with m one scalar mean over all entries of the *prediction*: layers,
    tokens and channels are pooled (so the states with the largest norms decide), layer 0 is
    included (it is equal by construction), and the denominator is not the teacher's variance. The
    published evaluation averages it over batches of 64 images. `RSquared` is our own definition:
    per channel, layer and token group, around the teacher's means.

    Args:
        prediction: (B, L + 1, N, D), a student's trajectory with layer 0.
        target: (B, L + 1, N, D), its teacher's.

    Raises:
        ValueError: different shapes.
    """
    check_shapes(prediction, target)
    prediction, target = prediction.double(), target.double()
    error = (prediction - target).square().sum()
    return float(1 - error / (prediction - prediction.mean()).square().sum())


def check_shapes(prediction: torch.Tensor, target: torch.Tensor) -> None:
    """Refuse trajectories of different shapes."""
    if prediction.shape != target.shape:
        raise ValueError(
            "Student and teacher must have the same trajectory shape; got "
            f"{tuple(prediction.shape)} and {tuple(target.shape)}."
        )


def state_statistics(
    *, prediction: torch.Tensor, target: torch.Tensor, groups: dict[str, slice]
) -> dict[str, list]:
    """Rows for `RSquared.add_batch`: one per layer 1 … L and token group.

    Args:
        prediction: (B, L + 1, N, D), a student's trajectory.
        target: (B, L + 1, N, D), its teacher's; layer 0 is the same by construction and left out.
        groups: token groups (`TokenLayout.groups`).

    Raises:
        ValueError: different shapes.
    """
    check_shapes(prediction, target)
    names = ("layer", "group", "count", "squared_error", "target_square", "target_sum")
    rows: dict[str, list] = {name: [] for name in names}
    prediction, target = prediction.double(), target.double()
    for name, tokens in groups.items():
        states = target[:, 1:, tokens]
        error = (prediction[:, 1:, tokens] - states).square().sum(dim=(0, 2, 3))
        rows["layer"] += range(1, target.shape[1])
        rows["group"] += [name] * len(error)
        rows["count"] += [states.shape[0] * states.shape[2]] * len(error)
        rows["squared_error"] += error.tolist()
        rows["target_square"] += states.square().sum(dim=(0, 2, 3)).tolist()
        rows["target_sum"] += states.sum(dim=(0, 2)).tolist()
    return rows

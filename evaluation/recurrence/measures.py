"""Distances of a student from its teacher, and statistics of them over seeds.

ε of the ε-block-recurrence hypothesis (arXiv 2512.19941, §2) is the mean over images of the
Frobenius norm of the difference, for every layer. The paper leaves its unit open: it is given as it
is, over the norm of the states, and over their spread.
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from raptor_hf.configuration_raptor import TokenLayout, token_layout
from raptor_hf.distillation.rollout import Span, rollout
from raptor_hf.metrics import RSquared, compute_over_processes, state_statistics
from raptor_hf.modeling_raptor import rotary_angles

_IMAGES_AT_ONCE = 64
_DRAWS = 2000  # of a bootstrap
_SATURATED = 0.05  # a further block that lowers the mean gap by a smaller share adds little


def state_sizes(states: torch.Tensor, layout: TokenLayout) -> dict[str, dict[str, list[float]]]:
    """Return the sizes of a teacher's states (n, S, N, D), by token group and layer.

    Returns:
        `norm`: the mean over images of the Frobenius norm of a group's tokens; `spread`: the root
        of the mean square of their distance from the channels' means over images and tokens.
        `all` holds every token.
    """
    sizes: dict[str, dict[str, list[float]]] = {"norm": {}, "spread": {}}
    squares, spreads = 0.0, 0.0
    for name, tokens in layout.groups().items():
        part = states[:, :, tokens].double()
        centred = part - part.mean(dim=(0, 2), keepdim=True)
        square, spread = part.square().sum(dim=(2, 3)), centred.square().sum(dim=(2, 3)).mean(0)
        sizes["norm"][name] = square.sqrt().mean(dim=0).tolist()
        sizes["spread"][name] = spread.sqrt().tolist()
        squares, spreads = squares + square, spreads + spread
    sizes["norm"]["all"] = squares.sqrt().mean(dim=0).tolist()
    sizes["spread"]["all"] = spreads.sqrt().tolist()
    return sizes


@torch.no_grad()
def measure_gap(
    spans: list[Span], teacher: PreTrainedModel, states: torch.Tensor, image_size: tuple[int, int]
) -> tuple[dict, torch.Tensor]:
    """Measure the distance of spans, rolled out from the first state, to a teacher's states.

    Args:
        states: (n, S + 1, N, D), those that the spans start from and make.
        image_size: height and width of the images in pixels.

    Returns:
        A dict of: `absolute`, by token group a list over the S layers: ε = mean of ‖f − R‖_F;
        `relative`: that over the mean of ‖f‖_F; `to_spread`: over the spread (`state_sizes`), 1 for
        the mean of each channel; `r2` as `RSquared` gives it (`layers`, `mean`).
        And the last predicted state, (n, N, D).
    """
    layout = token_layout(teacher.config)
    groups, angles = layout.groups(), rotary_angles(teacher, image_size)
    # roll out, and keep what R² and ε are computed from
    statistics, norms, last = [], [], []
    for target in states.split(_IMAGES_AT_ONCE):
        prediction = rollout(spans, target, resets={spans[0].start}, angles=angles)
        whole = torch.cat([target[:, :1], prediction], dim=1)
        statistics.append(state_statistics(prediction=whole, target=target, groups=groups))
        error = (whole - target)[:, 1:].double().square().sum(dim=-1)
        by_group = {name: error[..., tokens].sum(dim=-1) for name, tokens in groups.items()}
        norms.append({**by_group, "all": error.sum(dim=-1)})
        last.append(prediction[:, -1])
    # ε, and its two ratios
    sizes = state_sizes(states[:, 1:], layout)
    result: dict = {"absolute": {}, "relative": {}, "to_spread": {}}
    for name in norms[0]:
        epsilon = torch.cat([part[name] for part in norms]).sqrt().mean(dim=0).cpu()
        result["absolute"][name] = epsilon.tolist()
        result["relative"][name] = (epsilon / torch.tensor(sizes["norm"][name])).tolist()
        result["to_spread"][name] = (epsilon / torch.tensor(sizes["spread"][name])).tolist()
    result["r2"] = compute_over_processes(RSquared, statistics)
    return result, torch.cat(last)


def values_of(rows: Sequence[dict], figure: str, **label) -> np.ndarray:
    """Return a figure of all rows with a label, over seeds.

    Args:
        rows: of an experiment.
        figure: `"accuracy"`, `"r2"` (mean over layers), `"median cls"` (R², median over layers, as
            the little variance of cls at layer 1 would rule the mean), `"last"` (R² of the last
            state), or `"gap"` (ε over the spread, mean over layers). A token group may follow,
            default `all`. Untied layers have the last state alone.
        label: values by key that a row must have.
    """
    name, _, group = figure.partition(" ")
    group = group or "all"
    values = []
    for row in rows:
        other = any(row.get(key) != value for key, value in label.items())
        if other or (name in ("r2", "median", "gap") and row.get("untied")):
            continue
        if name == "accuracy":
            values.append(row["accuracy"])
        elif name == "r2":
            values.append(row["r2"]["mean"].get(group))
        elif name == "median":
            values.append(median_r2(row, group))
        elif name == "last":
            values.append(row["r2"]["layers"][group][-1])
        else:
            values.append(float(np.mean(row["to_spread"][group])))
    return np.array([value for value in values if value is not None])


def median_r2(row: dict, group: str) -> float | None:
    """Return the median over layers of R² of a token group, without layers that have none."""
    layers = [r2 for r2 in row["r2"]["layers"].get(group, ()) if r2 is not None]
    return float(np.median(layers)) if layers else None


def student_t(freedom: float, probability: float = 0.95) -> float:
    """Return t such that |T| < t with a probability, of Student's distribution.

    With T = √ν tan θ the density of θ is proportional to cos^{ν − 1} θ.
    """
    theta = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(theta) ** (freedom - 1)
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(np.sqrt(freedom) * np.tan(np.interp(probability, mass / mass[-1], theta)))


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % confidence interval (Student's t)."""
    if len(values) < 2:
        return float(values.mean()), float("nan")
    error = values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(student_t(len(values) - 1) * error)


def mean_in_words(values: np.ndarray) -> str:
    """Return the mean of figures over seeds and its interval as text; "–" of none."""
    if not len(values):
        return "–"
    mean, width = interval(values)
    return f"{mean:.4f}" if np.isnan(width) else f"{mean:.4f} ± {width:.4f}"


def difference(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Return the difference of two means and its 95 % confidence interval (Welch's t)."""
    mean = float(first.mean() - second.mean())
    if min(len(first), len(second)) < 2:
        return mean, float("nan"), float("nan")
    errors = [values.var(ddof=1) / len(values) for values in (first, second)]
    if sum(errors) == 0:
        return mean, mean, mean
    parts = [error**2 / (len(v) - 1) for error, v in zip(errors, (first, second), strict=True)]
    width = student_t(sum(errors) ** 2 / sum(parts)) * np.sqrt(sum(errors))
    return mean, float(mean - width), float(mean + width)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks of values (…, n) less their mean; equal values share theirs."""
    below = (values[..., None] > values[..., None, :]).sum(axis=-1)
    equal = (values[..., None] == values[..., None, :]).sum(axis=-1)
    ranks = below + equal / 2
    return ranks - ranks.mean(axis=-1, keepdims=True)


def correlation(x: np.ndarray, y: np.ndarray, *, seed: int = 0) -> tuple[float, float, float]:
    """Return Spearman's rank correlation and its 95 % interval over bootstrap draws of the pairs.

    A draw in which one of the two is constant is left out; NaN where one is constant at all.
    """
    if len(set(x)) < 2 or len(set(y)) < 2:
        return (float("nan"),) * 3
    draws = np.random.default_rng(seed).integers(len(x), size=(_DRAWS, len(x)))
    rows = np.concatenate([np.arange(len(x))[None], draws])  # the pairs themselves come first
    first, second = _ranks(x[rows]), _ranks(y[rows])
    spread = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    products = (first * second).sum(axis=1)
    rho = np.divide(products, spread, out=np.full(len(rows), np.nan), where=spread > 0)
    low, high = np.nanpercentile(rho[1:], [2.5, 97.5])
    return float(rho[0]), float(low), float(high)


def saturation(rows: Sequence[dict]) -> int | None:
    """Return the smallest k for which the next k lowers the gap by less than 5 %; None: none."""
    ks = sorted({row["k"] for row in rows})
    means = [values_of(rows, "gap", k=k).mean() for k in ks]
    for k, gap, following in zip(ks, means, means[1:], strict=False):
        if following > (1 - _SATURATED) * gap:
            return k
    return None

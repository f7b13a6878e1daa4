"""Figures of a study over seeds: means, intervals, differences, correlations."""

from collections.abc import Sequence

import numpy as np

_DRAWS = 2000  # of a bootstrap
_SATURATED = 0.05  # a further block that lowers the mean gap by a smaller share adds little


def values_of(rows: Sequence[dict], figure: str, **label) -> np.ndarray:
    """Return a figure of all rows with a label, over seeds.

    Args:
        figure: `"accuracy"`, `"r2"` and `"r2 cls"`, … (means over layers), `"last"` (R² of the last
            state), or `"gap"` (ε over the spread, all tokens, mean over layers). Untied layers, of
            which there are fewer than the teacher has, have the last state alone.
    """
    chosen = [row for row in rows if all(row.get(name) == value for name, value in label.items())]
    name, _, group = figure.partition(" ")
    read = {
        "accuracy": lambda row: row["accuracy"],
        "r2": lambda row: row["r2"]["mean"].get(group or "all"),
        "last": lambda row: row["r2"]["layers"][group or "all"][-1],
        "gap": lambda row: float(np.mean(row["to_spread"][group or "all"])),
    }[name]
    if name in ("r2", "gap"):
        chosen = [row for row in chosen if not row.get("untied")]
    values = [read(row) for row in chosen]
    return np.array([value for value in values if value is not None])


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % confidence interval (Student's t)."""
    from scipy import stats

    if len(values) < 2:
        return float(values.mean()), float("nan")
    width = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(width)


def mean_in_words(values: np.ndarray) -> str:
    """Return the mean of figures over seeds and its interval as text; "–" of none."""
    if not len(values):
        return "–"
    mean, width = interval(values)
    return f"{mean:.4f}" if np.isnan(width) else f"{mean:.4f} ± {width:.4f}"


def difference(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Return the difference of two means and its 95 % confidence interval (Welch's t)."""
    from scipy import stats

    mean = float(first.mean() - second.mean())
    if min(len(first), len(second)) < 2:
        return mean, float("nan"), float("nan")
    if first.std() == second.std() == 0:
        return mean, mean, mean
    found = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    return mean, float(found.low), float(found.high)


def correlation(x: np.ndarray, y: np.ndarray, *, seed: int = 0) -> tuple[float, float, float]:
    """Return Spearman's rank correlation and its 95 % interval over bootstrap draws of the pairs.

    A draw in which one of the two is constant is left out; NaN where one is constant at all.
    """
    from scipy import stats

    if len(set(x)) < 2 or len(set(y)) < 2:
        return (float("nan"),) * 3

    def ranks(values: np.ndarray) -> np.ndarray:
        ranked = stats.rankdata(values, axis=-1)
        return ranked - ranked.mean(axis=-1, keepdims=True)

    draws = np.random.default_rng(seed).integers(len(x), size=(_DRAWS, len(x)))
    rows = np.concatenate([np.arange(len(x))[None], draws])  # the pairs themselves come first
    first, second = ranks(x[rows]), ranks(y[rows])
    spread = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    products = (first * second).sum(axis=1)
    rho = np.divide(products, spread, out=np.full(len(rows), np.nan), where=spread > 0)
    low, high = np.nanpercentile(rho[1:], [2.5, 97.5])
    return float(rho[0]), float(low), float(high)


def saturation(rows: Sequence[dict]) -> int | None:
    """Return the smallest k whose gap the next k lowers by less than 5 %; None: none is."""
    ks = sorted({row["k"] for row in rows})
    means = [values_of(rows, "gap", k=k).mean() for k in ks]
    for k, gap, following in zip(ks, means, means[1:], strict=False):
        if following > (1 - _SATURATED) * gap:
            return k
    return None

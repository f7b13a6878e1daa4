"""Distances of a student from its teacher, and statistics of them over seeds.

ε of the ε-block-recurrence hypothesis (arXiv 2512.19941, §2) is the mean over images of the
Frobenius norm of the difference, for every layer. The paper leaves its unit open: it is given as it
is, and over the spread of the states.
"""

from collections.abc import Sequence

import numpy as np
import pandas
import torch
from scipy import stats
from transformers import PreTrainedModel

from raptor_hf.configuration_raptor import token_layout
from raptor_hf.distillation.matching import chain_statistics
from raptor_hf.distillation.rollout import Span, rollout
from raptor_hf.metrics import RSquared, compute_over_processes
from raptor_hf.modeling_raptor import rotary_angles

# figures of a student in tables
R2, R2_CLS, R2_PATCHES = "R²", "R² cls, median layer", "R² patches"
LAST, GAP, ACCURACY = "R², last state", "ε / spread", "accuracy"
FIGURES = [R2, R2_CLS, R2_PATCHES, LAST, GAP, ACCURACY]
_IMAGES_AT_ONCE = 64
_PERMUTATIONS = 10_000  # of a rank correlation; all of them of up to seven teachers


def state_spread(states: torch.Tensor, groups: dict[str, slice]) -> dict[str, torch.Tensor]:
    """Return the spread of a teacher's states (n, S, N, D), (S,) for every token group.

    It is the root of the mean square of the distance of a group's tokens from the channels' means
    over images and tokens. `all` holds every token.
    """
    squares = {}
    for name, tokens in groups.items():
        part = states[:, :, tokens].double()
        centred = part - part.mean(dim=(0, 2), keepdim=True)
        squares[name] = centred.square().sum(dim=(2, 3)).mean(dim=0).cpu()
    squares["all"] = sum(squares.values())
    return {name: square.sqrt() for name, square in squares.items()}


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
        `to_spread`: over the spread (`state_spread`), 1 for the mean of each channel; `r2` as
        `RSquared` gives it (`layers`, `mean`).
        And the last predicted state, (n, N, D).
    """
    groups = token_layout(teacher.config).groups()
    angles = rotary_angles(teacher, image_size)
    # roll out, and keep what R² and ε are computed from
    statistics, norms, last = [], [], []
    for target in states.split(_IMAGES_AT_ONCE):
        prediction = rollout(spans, target, resets={spans[0].start}, angles=angles)
        statistics.append(chain_statistics(prediction, target, groups))
        error = (prediction - target[:, 1:]).double().square().sum(dim=-1)
        by_group = {name: error[..., tokens].sum(dim=-1) for name, tokens in groups.items()}
        norms.append({**by_group, "all": error.sum(dim=-1)})
        last.append(prediction[:, -1])
    # ε, and over the spread
    spread = state_spread(states[:, 1:], groups)
    result: dict = {"absolute": {}, "to_spread": {}}
    for name in norms[0]:
        epsilon = torch.cat([part[name] for part in norms]).sqrt().mean(dim=0).cpu()
        result["absolute"][name] = epsilon.tolist()
        result["to_spread"][name] = (epsilon / spread[name]).tolist()
    result["r2"] = compute_over_processes(RSquared, statistics)
    return result, torch.cat(last)


def table_of(rows: Sequence[dict]) -> pandas.DataFrame:
    """Return the students of an experiment with their labels and `FIGURES`, a row a student.

    R² is the mean over layers; of cls the median, as the little variance of cls at layer 1 would
    rule the mean. Students that learn the last state alone have no figures of the others.
    """
    table = []
    for row in rows:
        figures = {LAST: row["r2"]["layers"]["all"][-1], ACCURACY: row["accuracy"]}
        if not row["untied"]:
            cls = [r2 for r2 in row["r2"]["layers"].get("cls", ()) if r2 is not None]
            figures[R2] = row["r2"]["mean"]["all"]
            figures[R2_CLS] = np.median(cls) if cls else None
            figures[R2_PATCHES] = row["r2"]["mean"]["patches"]
            figures[GAP] = np.mean(row["to_spread"]["all"])
        table.append({**row, **figures})
    frame = pandas.DataFrame(table)
    return frame.astype(dict.fromkeys(FIGURES, float))


def mean_in_words(values: pandas.Series) -> str:
    """Return the mean over seeds, and half of its 95 % interval where there are three or more."""
    values = values.dropna()
    if not len(values):
        return "–"
    if len(values) < 3:
        return f"{values.mean():.4f}"
    width = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{values.mean():.4f} ± {width:.4f}"


def difference(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Return the difference of two means and its 95 % confidence interval (Welch's t)."""
    test = stats.ttest_ind(first, second, equal_var=False)
    return (float(np.mean(first) - np.mean(second)), *map(float, test.confidence_interval()))


def rank_correlation(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return Spearman's rank correlation, and the p of so large a one over all orders of y."""

    def rho(order: np.ndarray) -> float:
        return stats.spearmanr(x, order).statistic

    test = stats.permutation_test(
        [y], rho, permutation_type="pairings", n_resamples=_PERMUTATIONS, rng=0
    )
    return float(test.statistic), float(test.pvalue)

"""Distances of a student from its teacher, and statistics of them over seeds.

ε of the ε-block-recurrence hypothesis (arXiv 2512.19941, §2) is the mean over images of the
Frobenius norm of the difference, for every layer. The paper leaves its unit open: here it is the
spread of the states.
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
from raptor_hf.phases import cuts

# figures of a student in tables
R2, R2_CLS, R2_PATCHES = "R²", "R² cls, median layer", "R² patches"
LAST, GAP = "R², last state", "ε / spread"
FIGURES = [R2, R2_CLS, R2_PATCHES, LAST, GAP]
_IMAGES_AT_ONCE = 64
_ORDERS = 10_000  # random ones, of a rank correlation


def state_spread(states: torch.Tensor, groups: dict[str, slice]) -> torch.Tensor:
    """Return the spread of a teacher's states (n, S, N, D), (S,).

    It is the root of the mean square of the distance of an image's tokens from the channels' means
    over images and the tokens of the group.
    """
    square = torch.zeros(states.shape[1], dtype=torch.double)
    for tokens in groups.values():
        part = states[:, :, tokens].double()
        centred = part - part.mean(dim=(0, 2), keepdim=True)
        square += centred.square().sum(dim=(2, 3)).mean(dim=0).cpu()
    return square.sqrt()


@torch.no_grad()
def measure_gap(
    spans: list[Span], teacher: PreTrainedModel, states: torch.Tensor, image_size: tuple[int, int]
) -> dict:
    """Measure the distance of spans, rolled out from the first state, to a teacher's states.

    Args:
        states: (n, S + 1, N, D), those that the spans start from and make.
        image_size: height and width of the images in pixels.

    Returns:
        A dict of: `to_spread`, a list over the S layers: ε = mean of ‖f − R‖_F over the spread
        (`state_spread`), 1 for the mean of each channel; `r2` as `RSquared` gives it (`layers`,
        `mean`).
    """
    groups = token_layout(teacher.config).groups()
    angles = rotary_angles(teacher, image_size)
    # roll out, and keep what R² and ε are computed from
    statistics, norms = [], []
    for target in states.split(_IMAGES_AT_ONCE):
        prediction = rollout(spans, target, resets={spans[0].start}, angles=angles)
        statistics.append(chain_statistics(prediction, target, groups))
        norms.append((prediction - target[:, 1:]).double().flatten(2).norm(dim=2))
    epsilon = torch.cat(norms).mean(dim=0).cpu() / state_spread(states[:, 1:], groups)
    return {"to_spread": epsilon.tolist(), "r2": compute_over_processes(RSquared, statistics)}


def figures_of_r2(scores: dict) -> dict[str, float | None]:
    """Return R² over the layers, from those of `RSquared`: means, and the median of cls.

    The little variance of cls at layer 1 would rule its mean.
    """
    cls = [r2 for r2 in scores["layers"].get("cls", ()) if r2 is not None]
    return {
        R2: scores["mean"]["all"],
        R2_CLS: float(np.median(cls)) if cls else None,
        R2_PATCHES: scores["mean"]["patches"],
    }


def table_of(rows: Sequence[dict]) -> pandas.DataFrame:
    """Return the students of an experiment with their labels and `FIGURES`, a row a student."""
    table = []
    for row in rows:
        figures = {**figures_of_r2(row["r2"]), LAST: row["r2"]["layers"]["all"][-1]}
        figures[GAP] = np.mean(row["to_spread"])
        parts = tuple(map(tuple, row["parts"])) if "parts" in row else None
        table.append({**row, **figures, "parts": parts})
    frame = pandas.DataFrame(table)
    return frame.astype({name: float for name in FIGURES if name in frame})


def mean_in_words(values: pandas.Series) -> str:
    """Return the mean over seeds, and half of its 95 % interval where there are three or more."""
    values = values.dropna()
    if not len(values):
        return "–"
    if len(values) < 3:
        return f"{values.mean():.4f}"
    width = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{values.mean():.4f} ± {width:.4f}"


def cut_share(distance: np.ndarray, parts: Sequence[Sequence[int]]) -> float:
    """Return the share of the distances (L, L) that lies between parts of the layers 1 … L."""
    part = np.zeros(len(distance))
    for number, layers in enumerate(parts):
        part[np.array(layers) - 1] = number
    return cuts.cut_share(distance, part)


def rank_correlation(groups: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """Return Spearman's rank correlation, mean over groups, and the p of one so far from 0.

    p is two-sided, over random orders within the groups.

    Args:
        groups: x and y, (n,) each, such as the partitions of one teacher.
    """
    pairs = [(_scores(x), _scores(y)) for x, y in groups]
    generator, found = np.random.default_rng(0), np.zeros(_ORDERS)
    for x, y in pairs:
        found += generator.permuted(np.tile(y, (_ORDERS, 1)), axis=1) @ x / len(pairs)
    return _as_far(float(np.mean([x @ y for x, y in pairs])), found)


def better_rank(
    groups: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> tuple[float, float]:
    """Return how much better x than z goes with y, in Spearman's ρ, mean over groups, and its p.

    p is two-sided, over random exchanges of the ranks of x and z of single pairs.

    Args:
        groups: x, z and y, (n,) each.
    """
    generator, gain, found = np.random.default_rng(0), 0.0, np.zeros(_ORDERS)
    for x, z, y in groups:
        less, scores = _scores(x) - _scores(z), _scores(y)
        signs = generator.choice([-1, 1], size=(_ORDERS, len(less)))
        gain += float(less @ scores) / len(groups)
        found += (signs * less) @ scores / len(groups)
    return _as_far(gain, found)


def _as_far(value: float, drawn: np.ndarray) -> tuple[float, float]:
    """Return a value, and the p of one so far from 0 among those drawn at random."""
    as_far = np.sum(np.abs(drawn) >= abs(value) - 1e-12)
    return value, float((1 + as_far) / (1 + len(drawn)))


def _scores(values: np.ndarray) -> np.ndarray:
    """Return centred ranks of length 1, whose products are Spearman's correlations."""
    ranks = stats.rankdata(values)
    ranks -= ranks.mean()
    return ranks / np.linalg.norm(ranks)

"""Claims about block recurrence, each decided by the figures of a study.

The criteria are ours, as the paper states none. The unit of replication of claims about teachers is
the teacher. R² of a Raptor counts as far as it is beyond its floor, that of a_0 plus the mean
update: alike layers make it easy to stand still.
"""

from collections.abc import Callable

import numpy as np
import pandas

from evaluation.verdicts import Claim, Estimate, Verdict, by_estimates, difference, estimate
from raptor_hf.phases.nulls import beyond_turns, independent_turns, straight_line

from .measures import (
    GAP,
    R2,
    R2_CLS,
    R2_PATCHES,
    better_rank,
    cut_share,
    rank_correlation,
    table_of,
)

_PAPER, _REVIEWERS = "arXiv 2512.19941", "the paper's reviewers"
_SATURATED = 0.05  # a further block that lowers the mean gap by a smaller share adds little
_FEWEST = 5  # teachers or partitions that a rank correlation needs
_NOT_RUN = Verdict(None, "not run: it needs students that the study does not have")
_Decide = Callable[[dict], Verdict | None]


def _saturates(study: dict) -> Verdict | None:
    """Decide whether the last block adds little."""
    if not study.get("gap"):
        return None
    gaps = [rows[GAP] for _, rows in table_of(study["gap"]).groupby("k")]
    if len(gaps) < 2 or min(map(len, gaps)) < 2:
        return _NOT_RUN
    gain = difference(*(estimate(np.log(rows)) for rows in gaps[-2:]))
    little = Estimate(-np.log(1 - _SATURATED) - gain.mean, gain.error, gain.dof)
    means = ", ".join(f"{rows.mean():.3f}" for rows in gaps)
    return by_estimates([little], f"ε over the spread: {means}; less than 5 % by {little}")


def _beats(first: str, *others: str) -> _Decide:
    """Decide whether R² of a kind of partition is above that of others at k = 2, 3 and 4."""

    def decide(study: dict) -> Verdict | None:
        if not study.get("partitions"):
            return None
        estimates, texts = [], []
        for k, rows in table_of(study["partitions"]).groupby("k"):
            own = rows[rows.partition == first]
            for other in others:
                those = rows[rows.partition == other]
                if min(len(own), len(those)) < 2:
                    return _NOT_RUN
                same = set(own.parts) == set(those.parts)
                gain = Estimate(0, 0, 1)  # a partition is not better than itself
                if not same:
                    gain = difference(estimate(own[R2]), estimate(those[R2]))
                estimates.append(gain)
                texts.append(f"k = {k}, {other}: {'the same' if same else gain}")
        return by_estimates(estimates, "; ".join(texts))

    return decide


def drifts(distance: np.ndarray) -> dict[str, np.ndarray]:
    """Return distances without phases: equal steps, and independent turns at the same speeds."""
    turns = independent_turns(1 - np.diagonal(distance, 1))
    return {"a straight line": straight_line(len(distance)), "the speeds alone": 1 - turns}


def _share_tells(null: str | None = None) -> _Decide:
    """Decide whether R² rises with the cut share, or more so than with that of a null."""

    def decide(study: dict) -> Verdict | None:
        groups, names = [], []
        table = table_of(study.get("partitions") or [])
        for (teacher, k), rows in table.groupby(["teacher", "k"]) if len(table) else ():
            means = rows.groupby("parts")[R2].mean()
            if len(means) >= _FEWEST:
                distance = np.array(study["maps"][teacher]["distance"])
                compared = [distance, drifts(distance)[null]] if null else [distance]
                shares = [[cut_share(d, parts) for parts in means.index] for d in compared]
                groups.append((*map(np.array, shares), means.to_numpy()))
                names.append(f"{teacher}, k = {k}, {len(means)} partitions")
        if not groups:
            return None
        test, sign = (better_rank, "ρ larger by") if null else (rank_correlation, "ρ =")
        rho, p = test(groups)
        single = [f"{n}: {test([one])[0]:+.2f}" for n, one in zip(names, groups, strict=True)]
        return Verdict(rho > 0, f"{sign} {rho:+.2f} on average; {'; '.join(single)}", p)

    return decide


def beyond_floor(r2: float, floor: float) -> float:
    """Return the share of what standing still with the mean update leaves that R² explains."""
    return 1 - (1 - r2) / (1 - floor)


def teachers_of(study: dict) -> pandas.DataFrame:
    """Return the teachers with their figures, and the means of those of their students.

    `contrast` is that of three phases beyond independent turns of the same sizes.
    """
    rows, table = [], table_of(study.get("training") or [])
    for name, students in table.groupby("teacher", sort=False) if len(table) else ():
        found, means = study["maps"][name], students[[R2, R2_CLS, R2_PATCHES]].mean()
        similarity = 1 - np.array(found["distance"])
        turns = independent_turns(np.diagonal(similarity, 1))
        row = {
            "teacher": name,
            "drop rate": found["drop_path_rate"],
            "similarity": found["similarity"],
            "contrast": beyond_turns(similarity, turns, found["phases"]["3"])["contrast"],
        }
        for figure in (R2, R2_CLS, R2_PATCHES):
            if "floor" in found:
                row[figure] = beyond_floor(means[figure], found["floor"][figure])
        rows.append(row)
    columns = ["teacher", "drop rate", "similarity", "contrast", R2, R2_CLS, R2_PATCHES]
    return pandas.DataFrame(rows, columns=columns)


def _rises(figure: str, with_what: str = "drop rate") -> _Decide:
    """Decide whether a figure of the fully trained teachers rises with another one."""

    def decide(study: dict) -> Verdict | None:
        table = teachers_of(study)
        if not len(table):
            return None
        other = table.teacher.str.startswith(("untrained", "over"))
        table = table[~other].dropna(subset=[figure, with_what]).astype({figure: float})
        if len(table) < _FEWEST:
            return _NOT_RUN
        rho, p = rank_correlation([(table[with_what], table[figure])])
        return Verdict(rho > 0, f"ρ = {rho:+.2f}, {len(table)} teachers", p)

    return decide


def _falls_late(figure: str) -> _Decide:
    """Decide whether a figure falls from the first to the last checkpoint of a run: `over_…`."""

    def decide(study: dict) -> Verdict | None:
        table = teachers_of(study)
        if not len(table):
            return None
        table = table[table.teacher.str.startswith("over_")].dropna(subset=[figure])
        names = table.teacher.str.split("_", expand=True)
        if len(table):
            table = table.assign(run=names[1], step=names[2].astype(int))
            runs = [rows.sort_values("step")[figure] for _, rows in table.groupby("run")]
            falls = [rows.iloc[0] - rows.iloc[-1] for rows in runs if len(rows) > 1]
            if len(falls) > 1:
                fall = estimate(falls)
                return by_estimates([fall], f"falls by {fall}, {len(falls)} runs")
        return _NOT_RUN

    return decide


_BY_RATE = "rank correlation with the drop rate above 0, over teachers"
CLAIMS = [
    Claim("ε saturates as blocks are added", _REVIEWERS,
          "the last block lowers the gap by less than 5 %", _saturates),
    Claim("Max-cut beats random runs, and even ones", _PAPER,
          "R² is larger than that of random runs and of equal ones, which a straight line has",
          _beats("max-cut", "random", "uniform")),
    Claim("Runs of layers beat shuffled layers", _PAPER,
          "R² of max-cut is larger than that of parts of the same sizes",
          _beats("max-cut", "shuffled")),
    Claim("Raptors follow better where the cut share is larger", _PAPER,
          "rank correlation over the partitions of a teacher and k above 0, orders within these",
          _share_tells()),
    Claim("… and better than by the cut share of a straight line", _PAPER,
          "the rank correlation is larger than with the cut share of |i − j|",
          _share_tells("a straight line")),
    Claim("… and better than by that of the layers' speeds alone", _PAPER,
          "the same, of independent turns with the similarities of neighbours",
          _share_tells("the speeds alone")),
    Claim("Stochastic depth makes layers alike", _PAPER, _BY_RATE, _rises("similarity")),
    Claim("… sharpens phases", _PAPER,
          f"{_BY_RATE}, of the contrast beyond independent turns", _rises("contrast")),
    Claim("… lets a Raptor follow: cls", _PAPER, f"{_BY_RATE}, of R² beyond the floor",
          _rises(R2_CLS)),
    Claim("… lets a Raptor follow: patches", _PAPER, "the same", _rises(R2_PATCHES)),
    Claim("Alike layers are easier to follow", _PAPER,
          "rank correlation of layer similarity and R² of patches beyond the floor above 0",
          _rises(R2_PATCHES, "similarity")),
    Claim("Overfitting makes layers less alike", _PAPER,
          "similarity falls between checkpoints of a run, over three runs",
          _falls_late("similarity")),
    Claim("… and harder to follow", _PAPER, "the same, of R² beyond the floor", _falls_late(R2)),
]  # fmt: skip

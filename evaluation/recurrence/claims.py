"""Claims about block recurrence, each decided by the figures of a study.

The criteria are ours, as the paper states none. After a first look at the figures of the digits
they were changed: rank correlations take one pair a teacher; an interval that holds 0 is "can't
tell"; R² of cls is that of the median layer. Claims that cannot fail, that a copy of the embeddings
or a straight line |i − j| fulfils, and accuracies that 360 images can't tell apart are gone.
"""

from collections.abc import Callable

import numpy as np

from evaluation.claims import Claim, Verdict, all_of, by_interval

from .measures import GAP, R2, R2_CLS, R2_PATCHES, difference, rank_correlation, table_of

_PAPER, _OURS, _REVIEWERS = "paper", "ours", "the paper's reviewers"
_SATURATED = 0.05  # a further block that lowers the mean gap by a smaller share adds little
_CLEAR = 0.05  # a smaller p
_Decide = Callable[[dict], Verdict | None]


def _saturates(study: dict) -> Verdict | None:
    """Decide whether a further block adds little from some k on."""
    if not study.get("gap"):
        return None
    means = table_of(study["gap"]).groupby("k")[GAP].mean()
    gains = 1 - means.to_numpy()[1:] / means.to_numpy()[:-1]
    text = ", ".join(f"k = {k}: {gap:.3f}" for k, gap in means.items())
    return Verdict(bool((gains < _SATURATED).any()), f"ε over the spread, {text}")


def _cut_matters(other: str) -> _Decide:
    """Decide whether R² of max-cut is above that of another kind of partition at every k."""

    def decide(study: dict) -> Verdict | None:
        if not study.get("partitions"):
            return None
        clear, texts = [], []
        for k, rows in table_of(study["partitions"]).groupby("k"):
            first, second = (rows[rows.partition == kind][R2] for kind in ("max-cut", other))
            mean, low, high = difference(first, second)
            clear.append(by_interval(low, high))
            texts.append(f"k = {k}: {mean:+.4f} [{low:+.4f}, {high:+.4f}]")
        return Verdict(all_of(clear), "; ".join(texts))

    return decide


def _rises(figure: str, with_what: str = "drop rate", sign: int = 1) -> _Decide:
    """Decide whether a figure of the teachers rises (or, with −1, falls) with another one.

    A pair a teacher: the students of one teacher are not independent.
    """

    def decide(study: dict) -> Verdict | None:
        rows = []
        for row in study.get("training") or []:
            if row["teacher"] == "teacher" or row["teacher"].startswith("drop_"):
                found = study["maps"][row["teacher"]]
                facts = {name: found[name] for name in ("similarity", "contrast")}
                rows.append({**row, **facts, "drop rate": found["drop_path_rate"]})
        if not rows:
            return None
        # the mean over the students of each teacher
        means = table_of(rows).groupby("teacher")[[with_what, figure]].mean()
        if len(means) < 3:
            return None
        rho, p = rank_correlation(means[with_what].to_numpy(), means[figure].to_numpy())
        seen = None
        if p < _CLEAR:
            seen = bool(np.sign(rho) == sign)
        return Verdict(seen, f"ρ = {rho:+.2f}, p = {p:.3f}, {len(means)} teachers")

    return decide


CLAIMS = [
    Claim("ε saturates as blocks are added", _REVIEWERS,
          "from some k on a further block lowers the gap by less than 5 %", _saturates),
    Claim("Max-cut beats random runs", _PAPER,
          "the 95 % interval of the difference of R² lies above 0 at every k",
          _cut_matters("random")),
    Claim("Max-cut beats shuffled layers", _PAPER, "the same", _cut_matters("shuffled")),
    Claim("Stochastic depth makes layers alike", _PAPER,
          "rank correlation with the drop rate above 0, p < .05 over all orders of the teachers",
          _rises("similarity")),
    Claim("… sharpens phases", _PAPER, "the same", _rises("contrast")),
    Claim("… lets a Raptor follow: cls", _PAPER, "the same", _rises(R2_CLS)),
    Claim("… lets a Raptor follow: patches", _PAPER, "the same", _rises(R2_PATCHES)),
    Claim("… and lowers ε", _OURS, "rank correlation below 0", _rises(GAP, sign=-1)),
    Claim("Alike layers are easier to follow", _PAPER,
          "rank correlation of layer similarity and R² of patches above 0",
          _rises(R2_PATCHES, "similarity")),
]  # fmt: skip

"""Judge claims by figures: one engine for the dynamics of depth and for the study of recurrence.

A claim is a sentence, a criterion, and a function that decides it. The function reads one result, a
dict of figures as it lies in JSON, and returns a `Verdict`, or None where the figures are missing.

Whatever a claim measures is an `Estimate`, signed such that the claim says "above 0". It is *seen*
where all of its estimates lie above 0, *not seen* where one lies below, and else one *can't tell*.
p is that of the more likely answer. `judge` corrects the p of all claims of a result by Holm's
method, and says "can't tell" where it is .05 or more.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from raptor_hf.reports.tables import markdown_table

_ALPHA = 0.05


class Estimate(NamedTuple):
    """A mean, its standard error, and the degrees of freedom of that."""

    mean: float
    error: float
    dof: float

    @property
    def p_above(self) -> float:
        """One-sided p of a mean so far above 0."""
        if self.error == 0:
            return 0.5 - 0.5 * float(np.sign(self.mean))
        return float(stats.t.sf(self.mean / self.error, self.dof))

    def __str__(self) -> str:
        """Return the mean and its 95 % interval."""
        width = stats.t.ppf(1 - _ALPHA / 2, self.dof) * self.error
        return f"{self.mean:+.3g} [{self.mean - width:+.3g}, {self.mean + width:+.3g}]"


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of values over images, seeds or teachers, at least two."""
    return Estimate(float(np.mean(values)), float(stats.sem(values)), len(values) - 1)


def difference(first: Estimate, second: Estimate) -> Estimate:
    """Return a difference of two means, with Welch's degrees of freedom."""
    squares = np.square([first.error, second.error])
    weights = np.sum(squares**2 / [first.dof, second.dof])
    dof = np.sum(squares) ** 2 / weights if weights else first.dof + second.dof
    return Estimate(first.mean - second.mean, float(np.sqrt(squares.sum())), float(dof))


def above_draws(own: Estimate, draws: Sequence[float]) -> Estimate:
    """Return a figure less that of a further draw of a null, of which some draws are known.

    The error is that of the figure and of a prediction: a null network lies as far above the mean
    of the others by chance.
    """
    variance = float(np.var(draws, ddof=1)) * (1 + 1 / len(draws))
    error = float(np.sqrt(own.error**2 + variance))
    return Estimate(own.mean - float(np.mean(draws)), error, len(draws) - 1)


class Verdict(NamedTuple):
    """Whether a claim holds by its criterion, and the figures that decide, in words.

    `seen` is None where the figures are too uncertain to tell; `p` is that of the answer, two-sided
    and not corrected, or None where the criterion has none.
    """

    seen: bool | None
    figures: str
    p: float | None = None


class Claim(NamedTuple):
    """A sentence, its source, the criterion in words, and the function that decides."""

    sentence: str
    source: str
    criterion: str
    decide: Callable[[dict], Verdict | None]


Judged = list[tuple[Claim, dict[str, Verdict | None]]]


def by_estimates(estimates: Sequence[Estimate], figures: str) -> Verdict:
    """Decide whether all estimates lie above 0, or one of them below."""
    above = [one.p_above for one in estimates]
    seen, unseen = max(above), len(above) * (1 - max(above))
    return Verdict(seen < unseen, figures, min(1.0, 2 * min(seen, unseen)))


def judge(claims: Sequence[Claim], results: Mapping[str, dict]) -> Judged:
    """Decide all claims for all results: each with its verdicts by the name of the result."""
    judged: Judged = [(claim, {}) for claim in claims]
    for name, result in results.items():
        verdicts = [claim.decide(result) for claim in claims]
        for (_, by_name), verdict in zip(judged, _corrected(verdicts), strict=True):
            by_name[name] = verdict
    return judged


def _corrected(verdicts: Sequence[Verdict | None]) -> list[Verdict | None]:
    """Correct the p of verdicts for their number (Holm 1979)."""
    corrected = list(verdicts)
    tested = [n for n, verdict in enumerate(verdicts) if verdict and verdict.p is not None]
    tested.sort(key=lambda n: verdicts[n].p)
    largest = 0.0
    for rank, n in enumerate(tested):
        verdict = verdicts[n]
        largest = max(largest, min(1.0, verdict.p * (len(tested) - rank)))
        seen = verdict.seen if largest < _ALPHA else None
        p = f"p = {largest:.2g}" if largest > 1e-9 else "p < 1e-9"
        figures = f"{verdict.figures}; {p}"
        corrected[n] = Verdict(seen, figures, largest)
    return corrected


def by_interval(low: float, high: float) -> bool | None:
    """Return whether an interval lies above 0, or below; None where it holds 0 or is unknown."""
    if low > 0:
        return True
    return False if high < 0 else None


def all_of(answers: Sequence[bool | None]) -> bool | None:
    """Return False if one answer is no, True if all are yes, else None."""
    if False in answers:
        return False
    return True if all(answers) else None


def verdict_word(verdict: Verdict | None) -> str:
    """Return a verdict as tables show it."""
    if verdict is None:
        return "–"
    if verdict.seen is None:
        return "can't tell"
    return "seen" if verdict.seen else "not seen"


def claims_table(judged: Judged, draws: Sequence[str] = ()) -> str:
    """Return a Markdown table of verdicts: a row a claim, a column a result.

    Args:
        judged: of `judge`.
        draws: kinds of null networks; results named `"{kind} {number}"` are counted in one column.
    """
    names = list(judged[0][1])
    kinds = {kind: [name for name in names if name.rpartition(" ")[0] == kind] for kind in draws}
    alone = [name for name in names if not any(name in found for found in kinds.values())]
    rows = []
    for claim, verdicts in judged:
        row = [claim.sentence, *(verdict_word(verdicts[name]) for name in alone)]
        for found in kinds.values():
            tested = [verdicts[name] for name in found if verdicts[name] is not None]
            row.append(f"{sum(v.seen is True for v in tested)} of {len(tested)}" if tested else "–")
        rows.append(row)
    return markdown_table(["claim", *alone, *(f"{kind}, seen" for kind in kinds)], rows)


def claims_details(judged: Judged, names: Sequence[str] | None = None) -> str:
    """Return the criterion of every claim and the figures that decided, in Markdown.

    `names` of results, by default all.
    """
    paragraphs = []
    for claim, verdicts in judged:
        head = f"**{claim.sentence}** ({claim.source}). Seen if: {claim.criterion}."
        lines = []
        for name in names or verdicts:
            if verdicts[name] is not None:
                lines.append(f"- {name}: {verdict_word(verdicts[name])}. {verdicts[name].figures}")
        paragraphs.append("\n".join([head, "", *lines]).rstrip())
    return "\n\n".join(paragraphs)

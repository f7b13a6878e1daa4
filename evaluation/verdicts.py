"""Judge claims by figures: one engine for dynamics, for phases and for the study of recurrence.

A claim is a sentence, a criterion, and a function that decides it. The function reads one result, a
dict of figures as it lies in JSON, and returns a `Verdict`, or None where the figures are missing.

Whatever a claim measures is an `Estimate`, signed such that the claim says "above 0". It is *seen*
where all of its estimates lie above 0, *not seen* where one lies below, and else one *can't tell*.
p is that of the more likely answer. `judge` corrects the p of all claims of a result by Holm's
method, and says "can't tell" where it is .05 or more.

A claim about one network is decided beside null networks (`above_nulls`): its figures must also lie
above those of a further untrained network, and of a further one with its layers in random order.
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
    error = float(np.std(draws, ddof=1)) * np.sqrt(1 + 1 / len(draws))
    return difference(own, Estimate(float(np.mean(draws)), float(error), len(draws) - 1))


class Verdict(NamedTuple):
    """Whether a claim holds by its criterion, and the figures that decide, in words.

    `seen` is None where the figures are too uncertain to tell; `p` is that of the answer, two-sided
    and not corrected, or None where the criterion has none. `deciding` is the figure that decides,
    in words: its name, its interval, and mean ± standard deviation of each kind of null.
    """

    seen: bool | None
    figures: str
    p: float | None = None
    deciding: tuple[str, str, str] = ("–", "–", "–")


class Claim(NamedTuple):
    """A sentence, its source, the criterion in words, and the function that decides."""

    sentence: str
    source: str
    criterion: str
    decide: Callable[[dict], Verdict | None]


Judged = list[tuple[Claim, dict[str, Verdict | None]]]


def by_estimates(estimates: Sequence[Estimate], figures: str) -> Verdict:
    """Decide whether all estimates lie above 0, or one of them below."""
    return _by_places([estimates], figures)


def _p_above(estimates: Sequence[Estimate]) -> float:
    """Return the p of all of them lying above 0: the largest."""
    return max(one.p_above for one in estimates)


def _by_places(places: Sequence[Sequence[Estimate]], figures: str) -> Verdict:
    """Decide whether all estimates of one place at least lie above 0, or one of every place below.

    p is corrected for the choice of the place, and of the estimate (Bonferroni).
    """
    above = [_p_above(estimates) for estimates in places]
    below = [len(own) * (1 - p) for own, p in zip(places, above, strict=True)]
    seen, unseen = len(places) * min(above), max(below)
    return Verdict(seen < unseen, figures, min(1.0, 2 * min(seen, unseen)))


def above_nulls(prefix: str, *, anywhere: bool = False) -> Callable[[dict], Verdict | None]:
    """Make a decision whether figures lie above 0 and above those of each kind of null network.

    Args:
        prefix: of the names of the figures.
        anywhere: that those of one place do is enough; a name is `"{place}: {figure}"`.

    Returns:
        A function of `figures`, mean, standard error and degrees of freedom by name, and `nulls`,
        lists of such figures by kind, of which two at least are needed.
    """

    def decide(result: dict) -> Verdict | None:
        places: dict[str, list] = {}
        for name, values in result["figures"].items():
            if not name.startswith(prefix):
                continue
            own, spreads = Estimate(*values), []
            estimates = [own]
            for kind, draws in result["nulls"].items():
                known = [draw[name][0] for draw in draws if name in draw]
                if len(known) > 1:
                    estimates.append(above_draws(own, known))
                    spreads.append(f"{kind} {np.mean(known):+.3f} ± {np.std(known, ddof=1):.3f}")
            place = name.partition(": ")[0] if anywhere else prefix
            words = (name, str(own), ", ".join(spreads) or "–")
            places.setdefault(place, []).append((estimates, words))
        if not places:
            return None

        # the figure that the answer hangs on: the weakest of the strongest place
        weakest = [max(figures, key=lambda one: _p_above(one[0])) for figures in places.values()]
        _, deciding = min(weakest, key=lambda one: _p_above(one[0]))
        texts = [
            f"{name}: {own}, {beside}"
            for figures in places.values()
            for _, (name, own, beside) in figures
        ]
        estimates = [sum((one for one, _ in figures), []) for figures in places.values()]
        return _by_places(estimates, "; ".join(texts))._replace(deciding=deciding)

    return decide


def judge_networks(
    claims: Sequence[Claim], networks: Mapping[str, Mapping], nulls: Sequence[str]
) -> Judged:
    """Judge claims of `above_nulls` for networks; a null network stands beside all others.

    Args:
        claims: to judge.
        networks: figures by name of the network.
        nulls: names of those that are nulls: `"{kind} {number}"`.
    """
    results = {}
    for name, figures in networks.items():
        others: dict[str, list] = {}
        for null in nulls:
            if null != name:
                others.setdefault(null.rpartition(" ")[0], []).append(networks[null])
        results[name] = {"figures": figures, "nulls": others}
    return judge(claims, results)


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
        corrected[n] = verdict._replace(seen=seen, figures=figures, p=largest)
    return corrected


def verdict_word(verdict: Verdict | None) -> str:
    """Return a verdict as tables show it."""
    if verdict is None:
        return "–"
    if verdict.seen is None:
        return "can't tell"
    return "seen" if verdict.seen else "not seen"


def claims_table(judged: Judged, nulls: Sequence[str] = ()) -> str:
    """Return a Markdown table of verdicts: a row a claim, a column a result.

    Args:
        judged: of `judge`.
        nulls: names of null networks, which are counted in one column.
    """
    names, rows = [name for name in judged[0][1] if name not in nulls], []
    for claim, verdicts in judged:
        row = [claim.sentence, *(verdict_word(verdicts[name]) for name in names)]
        rows.append([*row, *_count_seen(verdicts, nulls)])
    heading = ["nulls, seen"] if nulls else []
    return markdown_table(["claim", *names, *heading], rows)


def figures_table(judged: Judged, name: str, nulls: Sequence[str]) -> str:
    """Return a Markdown table of one network and its nulls: a row a claim that is decided."""
    rows = []
    for claim, verdicts in judged:
        if own := verdicts[name]:
            counts = _count_seen(verdicts, nulls)
            rows.append([claim.sentence, *own.deciding, verdict_word(own), *counts])
    return markdown_table(["claim", "figure", name, "nulls", "verdict", "nulls, seen"], rows)


def _count_seen(verdicts: Mapping[str, Verdict | None], nulls: Sequence[str]) -> list[str]:
    """Return in how many nulls a claim is seen, as a cell; no cell without nulls."""
    words = [verdict_word(verdicts[null]) for null in nulls if verdicts[null] is not None]
    return [f"{words.count('seen')} of {len(words)}" if words else "–"] if nulls else []


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

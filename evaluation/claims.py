"""Judge claims by figures: one engine for the dynamics of depth and for the study of recurrence.

A claim is a sentence, a criterion, and a function that decides it. The function reads one result, a
dict of figures as it lies in JSON, and returns a `Verdict`, or None where the figures are missing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from raptor_hf.reports.tables import markdown_table


class Verdict(NamedTuple):
    """Whether a claim holds by its criterion, and the figures that decide, in words.

    `seen` is None where the figures are too uncertain to tell: an interval holds both answers.
    """

    seen: bool | None
    figures: str


class Claim(NamedTuple):
    """A sentence, its source, the criterion in words, and the function that decides."""

    sentence: str
    source: str
    criterion: str
    decide: Callable[[dict], Verdict | None]


Judged = list[tuple[Claim, dict[str, Verdict | None]]]


def judge(claims: Sequence[Claim], results: Mapping[str, dict]) -> Judged:
    """Decide all claims for all results: each with its verdicts by the name of the result."""
    judged = []
    for claim in claims:
        verdicts = {name: claim.decide(result) for name, result in results.items()}
        judged.append((claim, verdicts))
    return judged


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


def claims_table(judged: Judged) -> str:
    """Return a Markdown table of verdicts: a row a claim, a column a result."""
    rows = []
    for claim, verdicts in judged:
        rows.append([claim.sentence, claim.source, *map(verdict_word, verdicts.values())])
    return markdown_table(["claim", "source", *judged[0][1]], rows)


def claims_details(judged: Judged) -> str:
    """Return the criterion of every claim and the figures that decided, in Markdown."""
    paragraphs = []
    for claim, verdicts in judged:
        head = f"**{claim.sentence}** ({claim.source}). Seen if: {claim.criterion}."
        lines = []
        for name, verdict in verdicts.items():
            if verdict is not None:
                lines.append(f"- {name}: {verdict_word(verdict)}. {verdict.figures}")
        paragraphs.append("\n".join([head, "", *lines]).rstrip())
    return "\n\n".join(paragraphs)

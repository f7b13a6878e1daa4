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


def judge(claims: Sequence[Claim], results: Mapping[str, dict]) -> list[dict]:
    """Decide all claims for all results.

    Returns:
        A dict a claim: `sentence`, `source`, `criterion`, and `verdicts` by the name of the result,
        each with `seen` (None: can't tell) and `figures`, empty where the result lacks them.
    """
    judged = []
    for claim in claims:
        verdicts = {}
        for name, result in results.items():
            verdict = claim.decide(result) or Verdict(None, "")
            verdicts[name] = {"seen": None, "figures": verdict.figures}
            if verdict.seen is not None:
                verdicts[name]["seen"] = bool(verdict.seen)
        judged.append(
            {
                "sentence": claim.sentence,
                "source": claim.source,
                "criterion": claim.criterion,
                "verdicts": verdicts,
            }
        )
    return judged


def verdict_word(verdict: dict) -> str:
    """Return a verdict as tables show it."""
    if not verdict["figures"]:
        return "–"
    return {True: "seen", False: "not seen", None: "can't tell"}[verdict["seen"]]


def by_interval(low: float, high: float) -> bool | None:
    """Return whether an interval lies above 0, or below; None where it holds 0 or is unknown."""
    if low > 0:
        return True
    return False if high < 0 else None


def claims_table(judged: Sequence[dict]) -> str:
    """Return a Markdown table of verdicts: a row a claim, a column a result."""
    names = list(judged[0]["verdicts"])
    rows = []
    for claim in judged:
        words = [verdict_word(claim["verdicts"][name]) for name in names]
        rows.append([claim["sentence"], claim["source"], *words])
    return markdown_table(["claim", "source", *names], rows)


def claims_details(judged: Sequence[dict]) -> str:
    """Return the criterion of every claim and the figures that decided, in Markdown."""
    paragraphs = []
    for claim in judged:
        head = f"**{claim['sentence']}** ({claim['source']}). Seen if: {claim['criterion']}."
        lines = []
        for name, verdict in claim["verdicts"].items():
            if verdict["figures"]:
                lines.append(f"- {name}: {verdict_word(verdict)}. {verdict['figures']}")
        paragraphs.append("\n".join([head, "", *lines]).rstrip())
    return "\n\n".join(paragraphs)

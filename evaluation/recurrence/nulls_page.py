"""Tables, claims and figures of a study of nulls, made of nulls.json alone."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from evaluation.claims import (
    Claim,
    Verdict,
    all_of,
    by_interval,
    claims_details,
    judge,
    verdict_word,
)
from evaluation.plotting import COLORS, GREY, make_panels
from raptor_hf.reports.tables import markdown_table

_PAPER = "arXiv 2512.19941"


class _Question(NamedTuple):
    """A claim that figures stand above 0 and above all nulls."""

    sentence: str
    criterion: str
    # of the `figures` of a network
    key: str
    # at every place; else at one at least
    everywhere: bool = False


_MORE = "at some k, layers of a phase are more alike than independent turns make them (within), \
and more so than layers of two phases at equal |i − j| (contrast)"
_SHORTER = "after every layer, a push loses length (minus the log of its growth)"
QUESTIONS = {
    one.key: one
    for one in (
        _Question("Layers gather in phases, raw cosine", _MORE, "raw cosine"),
        _Question("… centred cosine", _MORE, "centred cosine"),
        _Question("… debiased CKA", _MORE, "debiased CKA"),
        _Question("Layers of one phase stand in for each other", "at k = 2, 3 and 4 better than "
                  "layers of two phases at equal |i − j|", "swaps", True),
        _Question("Layers correct a pushed cls token", _SHORTER, "cls", True),
        _Question("Layers correct pushed patches", _SHORTER, "patches", True),
    )
}  # fmt: skip


def _margin(figure: dict) -> tuple[float, float]:
    """Return the interval of a figure, measured from 0 or from the largest value of the nulls."""
    bar = max(0, figure["null"] or 0)
    return figure["low"] - bar, figure["high"] - bar


def _in_words(figure: dict) -> str:
    """Return a figure and its interval."""
    return f"{figure['value']:+.3f} [{figure['low']:+.3f}, {figure['high']:+.3f}]"


def _places(question: _Question, network: dict) -> dict[str, dict]:
    """Return the figures of a network by place; no place without pairs of layers to compare."""
    places = network["figures"].get(question.key, {})
    return {p: f for p, f in places.items() if None not in [one["value"] for one in f.values()]}


def decide(question: _Question, network: dict) -> Verdict | None:
    """Answer a question for a network, beside the largest values of (other) null networks."""
    answers, texts = [], []
    for place, figures in _places(question, network).items():
        answers.append(all_of([by_interval(*_margin(one)) for one in figures.values()]))
        for name, one in figures.items():
            null = "" if one["null"] is None else f", nulls up to {one['null']:+.3f}"
            texts.append(f"{place}, {name} {_in_words(one)}{null}")
    if not answers:
        return None
    if question.everywhere:
        return Verdict(all_of(answers), "; ".join(texts))
    undecided = None if None in answers else False
    return Verdict(True in answers or undecided, "; ".join(texts))


CLAIMS = [Claim(q.sentence, _PAPER, q.criterion, partial(decide, q)) for q in QUESTIONS.values()]


def verdicts_table(result: dict) -> str:
    """Return a row a claim: the teacher's deciding figure beside the nulls', and the verdict.

    A place decides by its figure with the least margin; the claim by the place with the largest, or
    with the least where it must hold at every place.
    """
    rows, networks = [], result["networks"]
    teacher, nulls = networks[result["teacher"]], [networks[name] for name in result["nulls"]]
    for question in QUESTIONS.values():
        # what decides
        margins = {}
        for place, figures in _places(question, teacher).items():
            name = min(figures, key=lambda name: _margin(figures[name])[0])
            margins[_margin(figures[name])[0]] = (place, name, figures[name])
        if not margins:
            continue
        place, name, figure = margins[(min if question.everywhere else max)(margins)]

        # the same of the nulls
        values = [null["figures"][question.key][place][name]["value"] for null in nulls]
        words = ["–" if value is None else f"{value:+.3f}" for value in values]
        seen = [verdict_word(decide(question, null)) for null in nulls].count("seen")
        verdict = verdict_word(decide(question, teacher))
        row = [question.sentence, f"{place}, {name}", _in_words(figure), " ".join(words), verdict]
        rows.append([*row, f"{seen} of {len(nulls)}"])
    heading = f"nulls: {', '.join(result['nulls'])}"
    return markdown_table(["claim", "decided at", "teacher", heading, "verdict", "seen"], rows)


def phases_table(by_measure: dict[str, dict]) -> str:
    """Return a model's phases by measure, tokens and method, as `compare_with_turns` finds them.

    A cell holds the phases and, in brackets, those of independent turns. Below, what max-cut gains
    over the cut share of these.
    """
    rows = []
    for measure, by_tokens in by_measure.items():
        for tokens, found in by_tokens.items():
            cuts = found["cuts"]
            # the published method for both token groups alone
            methods = list(next(iter(cuts.values()))["phases"]) if tokens == "all" else ["maxcut"]
            for method in methods:
                cells = [phases_cell(cut, method) for cut in cuts.values()]
                rows.append([measure, tokens, method, *cells])
        rows.append(
            [measure, "all", "share gained", *(_in_words(c["share"]) for c in cuts.values())]
        )
    head = ["measure", "tokens", "method", *(f"k = {k}" for k in cuts)]
    return markdown_table(head, rows)


def phases_cell(cut: dict, method: str) -> str:
    """Return the phases of a cut, and in brackets those of independent turns; "–" for none."""
    found = [cut[name][method] for name in ("phases", "null_phases")]
    own, null = ("–" if phases is None else ", ".join(map(str, phases)) for phases in found)
    return f"{own} ({null})"


def r2_table(result: dict) -> str:
    """Return R² of predictions that know a_0 at most, and of Raptors: mean over layers."""
    rows = []
    for name, scores in result["r2"].items():
        means = [scores["mean"].get(group) for group in ("all", "cls", "patches")]
        rows.append([name, *("–" if mean is None else f"{mean:.3f}" for mean in means)])
    return markdown_table(["prediction", "R², all tokens", "R², cls", "R², patches"], rows)


def nulls_page(result: dict) -> str:
    """Return all tables, and the figures that decide the claims, in Markdown."""
    phases = result["networks"][result["teacher"]]["phases"]
    tables = [verdicts_table(result), phases_table(phases), r2_table(result)]
    details = claims_details(judge(CLAIMS, result["networks"]))
    return "\n\n".join(["# Phases against nulls", *tables, details]) + "\n"


def draw_nulls(result: dict) -> Iterator[tuple[str, Figure]]:
    """Yield the figures with their names."""
    yield "phases", _draw_phases(result)
    if result["num_runs"]:
        yield "swaps", _draw_swaps(result)
        yield "growth", _draw_growth(result)


def draw_matrix(axis, found: dict) -> AxesImage:
    """Draw distances of layers, below the diagonal, and above it those of independent turns.

    Args:
        axis: to draw on.
        found: of `compare_with_turns`; lines part its three phases, and those of the turns.
    """
    own, null = (1 - np.array(found[name]) for name in ("similarity", "independent_turns"))
    both, edge = np.tril(own) + np.triu(null), len(own) + 0.5
    image = axis.imshow(both, cmap="Blues", vmin=0, vmax=1, extent=(0.5, edge, edge, 0.5))
    axis.set(xticks=range(1, len(own) + 1, 2), yticks=range(1, len(own) + 1, 2))
    axis.grid(False)
    cut = found["cuts"]["3"]
    for end in np.cumsum(cut["phases"]["maxcut"])[:-1] + 0.5:
        axis.plot([0.5, end, end], [end, end, edge], color=COLORS[2], lw=1)
    for end in np.cumsum(cut["null_phases"]["maxcut"])[:-1] + 0.5:
        axis.plot([end, end, edge], [0.5, end, end], color=GREY, lw=1)
    return image


def _draw_phases(result: dict) -> Figure:
    """Draw a column a measure: distances beside those of turns, and cut shares over k."""
    teacher = result["networks"][result["teacher"]]["phases"]
    figure, axes = make_panels(2, len(teacher))
    figure.set_size_inches(6.4, 4.4)
    for (top, bottom), (measure, by_tokens) in zip(axes.T, teacher.items(), strict=True):
        # matrices
        found = by_tokens["all"]
        top.set_title(measure, fontsize="small")
        image = draw_matrix(top, found)

        # cut shares, those of turns alone in grey
        ks, shares = list(found["cuts"]), [cut["shares"] for cut in found["cuts"].values()]
        low, _, high = np.transpose([share["random_order"] for share in shares])
        order = {"color": GREY, "alpha": 0.3, "lw": 0, "label": "in random order"}
        bottom.fill_between(ks, low, high, **order)
        for null, style in (("independent", "--"), ("straight", ":")):
            values = [share[null] for share in shares]
            bottom.plot(ks, values, style, color=GREY, label=f"{null} turns")
        bottom.plot(ks, [share["own"] for share in shares], "ok", ms=4, label=result["teacher"])
        bottom.set_xlabel("k", fontsize="small")
    for axis, name in zip(axes[:, 0], ("distance", "share cut"), strict=True):
        axis.set_ylabel(name, fontsize="small")
    figure.colorbar(image, ax=axes[0].tolist(), shrink=0.7)
    series = bottom.get_legend_handles_labels()
    figure.legend(*series, loc="outside lower center", ncols=4, fontsize="x-small")
    return figure


def _draw_swaps(result: dict) -> Figure:
    """Draw all single swaps of the teacher, and their mean over |i − j|, nulls in grey."""
    networks = result["networks"]
    teacher = networks[result["teacher"]]
    matrix = np.array(teacher["swaps"])
    depth = np.arange(len(matrix))
    apart = abs(depth[:, None] - depth)
    figure, ((left, right),) = make_panels(1, 2)
    figure.set_size_inches(6.4, 3)
    edge = len(matrix) + 0.5
    image = left.imshow(matrix, cmap="viridis", vmax=1, extent=(0.5, edge, edge, 0.5))
    figure.colorbar(image, ax=left, shrink=0.8)
    left.set(xticks=depth[::2] + 1, yticks=depth[::2] + 1)
    left.set(xlabel="layer in its place", ylabel="layer replaced")
    left.grid(False)

    # at equal distance
    for number, name in enumerate(result["nulls"]):
        null, label = np.array(networks[name]["swaps"]), "nulls" if number == 0 else None
        means = [null[apart == distance].mean() for distance in depth[1:]]
        right.plot(depth[1:], means, color=GREY, lw=0.8, label=label)
    phases = teacher["phases"]["raw cosine"]["all"]["cuts"]["3"]["phases"]["maxcut"]
    phase = np.repeat(np.arange(len(phases)), phases)
    same = phase[:, None] == phase
    for label, kept, style in (("within a phase", same, "o-"), ("across", ~same, "s--")):
        there = np.unique(apart[kept & (apart > 0)])
        means = [matrix[kept & (apart == distance)].mean() for distance in there]
        right.plot(there, means, style, ms=4, label=label)
    right.set(xlabel="|i − j|, k = 3", ylabel="cosine of the last states")
    right.legend(fontsize="x-small")
    return figure


def _draw_growth(result: dict) -> Figure:
    """Draw a column a token group: the growth of a push by network, and the teacher's pushes."""
    groups = result["networks"][result["teacher"]]["growth"]
    figure, axes = make_panels(2, len(groups), sharex=True)
    figure.set_size_inches(6.4, 5)
    for (top, bottom), (group, pushes) in zip(axes.T, groups.items(), strict=True):
        # nulls are grey
        for number, (name, network) in enumerate(result["networks"].items()):
            style = {"color": COLORS[number % len(COLORS)], "label": name}
            if name in result["nulls"]:
                style = {"color": GREY, "lw": 0.8, "ls": ":" if "un" in name else "-"}
                style["label"] = name if name.endswith("1") else None
            top.plot(network["growth"][group]["0"]["growth"], **style)
        top.set_title(f"{group}: log of a push's length", fontsize="small")
        for number, (start, figures) in enumerate(pushes.items()):
            x = int(start) + np.arange(len(figures["angle"]))
            label = "norms alone" if number == 0 else None
            bottom.plot(x, figures["norms_alone"], "--", color=GREY, label=label)
            bottom.plot(x, figures["angle"], color=COLORS[number + 1], label=f"after {start}")
        bottom.set_title(f"{group}: share of its angle left", fontsize="small")
    for axis in axes[:, 0]:
        axis.legend(fontsize="x-small")
    figure.supxlabel("layer")
    return figure

"""Tables, claims and figures of a study of nulls, made of nulls.json alone."""

from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from evaluation.plotting import COLORS, GREY, make_panels
from evaluation.verdicts import (
    Claim,
    Judged,
    above_nulls,
    claims_details,
    figures_table,
    judge_networks,
)
from raptor_hf.reports.tables import markdown_table

_PAPER = "arXiv 2512.19941"
_MORE = "at some k, layers of a phase are more alike than independent turns make them (within), \
and more so than layers of two phases at equal |i − j| (contrast)"
GATHER = {
    measure: Claim(sentence, _PAPER, _MORE, above_nulls(measure, anywhere=True))
    for measure, sentence in (
        ("raw cosine", "Layers gather in phases, raw cosine"),
        ("centred cosine", "… centred cosine"),
        ("debiased CKA", "… debiased CKA"),
    )
}
CLAIMS = [
    *GATHER.values(),
    Claim("Layers of one phase stand in for each other", _PAPER,
          "at k = 2, 3 and 4 better than layers of two phases at equal |i − j|",
          above_nulls("swaps")),
]  # fmt: skip


def judge_nulls(result: dict) -> Judged:
    """Judge all claims for all networks of nulls.json."""
    networks = {name: network["figures"] for name, network in result["networks"].items()}
    return judge_networks(CLAIMS, networks, result["nulls"])


def verdicts_table(result: dict) -> str:
    """Return the claims of the teacher beside its nulls."""
    return figures_table(judge_nulls(result), result["teacher"], result["nulls"])


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
        shares = [cut["share"] for cut in cuts.values()]
        gained = [f"{value:+.3f} ± {1.96 * error:.3f}" for value, error in shares]
        rows.append([measure, "all", "share gained", *gained])
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
    names = [name for name in result["networks"] if name not in result["nulls"]]
    details = claims_details(judge_nulls(result), names)
    return "\n\n".join(["# Phases against nulls", *tables, details]) + "\n"


def draw_nulls(result: dict) -> Iterator[tuple[str, Figure]]:
    """Yield the figures with their names."""
    yield "phases", _draw_phases(result)
    if result["num_runs"]:
        yield "swaps", _draw_swaps(result)


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

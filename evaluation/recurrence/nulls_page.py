"""Tables, claims and figures of a study of nulls, made of nulls.json alone."""

from collections.abc import Callable, Iterator

import numpy as np
from matplotlib.figure import Figure

from evaluation.claims import Claim, Verdict, all_of, by_interval, judge, verdict_word
from evaluation.plotting import COLORS, make_panels
from raptor_hf.phases.stability import boundaries
from raptor_hf.reports.tables import markdown_table

_GREY, _PAPER = "#9a9a9a", "arXiv 2512.19941"


def _in_words(figure: dict) -> str:
    """Return a figure and its interval as text; "–" where there is none."""
    if figure["value"] is None:
        return "–"
    return f"{figure['value']:+.3f} [{figure['low']:+.3f}, {figure['high']:+.3f}]"


def _gathers(measure: str) -> Callable[[dict], Verdict]:
    """Decide whether a similarity has phases, at one k at least, that turns don't explain."""

    def decide(result: dict) -> Verdict:
        cuts = result["phases"][measure]["all"]["cuts"]
        texts = []
        for k, cut in cuts.items():
            within, contrast = _in_words(cut["within"]), _in_words(cut["contrast"])
            texts.append(f"k = {k}: {within} within, {contrast} against across")
        answers = [cut["seen"] for cut in cuts.values()]
        seen = None if None in answers else False
        return Verdict(True in answers or seen, "; ".join(texts))

    return decide


def _swaps(result: dict) -> Verdict | None:
    """Decide whether layers of a phase stand in for each other better than others as near."""
    if "swaps" not in result:
        return None
    gains = result["swaps"]["gains"]
    answers = [by_interval(gain["low"], gain["high"]) for gain in gains.values()]
    texts = [f"{name}: {_in_words(gain)}" for name, gain in gains.items()]
    return Verdict(all_of(answers), "; ".join(texts))


def _corrects(group: str) -> Callable[[dict], Verdict | None]:
    """Decide whether a small push loses length on its own tokens, after whichever layer."""

    def decide(result: dict) -> Verdict | None:
        if group not in result["growth"]:
            return None
        answers, texts = [], []
        for start, figures in result["growth"][group].items():
            length = figures["in_length"]
            answers.append(by_interval(-length["high"], -length["low"]))
            texts.append(f"after layer {start}: × {np.exp(length['value']):.2f}")
        return Verdict(all_of(answers), "; ".join(texts))

    return decide


_MORE = (
    "at some k, layers of a phase are more alike than independent turns make them, and more so "
    "than across phases at equal |i − j|, by .01 at least"
)
CLAIMS = [
    Claim("Layers gather in phases, raw cosine", _PAPER, _MORE, _gathers("raw cosine")),
    Claim("… centred cosine", _PAPER, _MORE, _gathers("centred cosine")),
    Claim("… debiased CKA", _PAPER, _MORE, _gathers("debiased CKA")),
    Claim("Layers of one phase stand in for each other", _PAPER,
          "at k = 2, 3 and 4 better than layers of two phases at equal |i − j|", _swaps),
    Claim("Layers correct a pushed cls token", _PAPER, "a push loses length", _corrects("cls")),
    Claim("Layers correct pushed patches", _PAPER, "a push loses length", _corrects("patches")),
]  # fmt: skip


def verdicts_table(result: dict) -> str:
    """Return the verdicts of all claims: of the teacher, its Raptors and its nulls, and in sum.

    In sum a claim is seen where the teacher is the only one to pass: what a null network passes,
    too, can't be told from it.
    """
    rows, networks = [], list(result["networks"])
    nulls = [name for name in networks if name not in (result["teacher"], *result["r2"])]
    for claim, verdicts in judge(CLAIMS, result["networks"]):
        teacher = verdicts[result["teacher"]]
        if teacher and teacher.seen and any(verdicts[n] and verdicts[n].seen for n in nulls):
            teacher = teacher._replace(seen=None)
        rows.append([claim.sentence, *map(verdict_word, verdicts.values()), verdict_word(teacher)])
    return markdown_table(["claim", *networks, "against the nulls"], rows)


def phases_table(result: dict) -> str:
    """Return the teacher's phases by measure, tokens and k.

    A cell holds the max-cut phases, in brackets those of independent turns, and the verdict.
    """
    rows = []
    for measure, by_tokens in result["networks"][result["teacher"]]["phases"].items():
        for tokens, figures in by_tokens.items():
            cells = []
            for cut in figures["cuts"].values():
                own, null = (", ".join(map(str, cut[n])) for n in ("phases", "independent_turns"))
                cells.append(f"{own} ({null}): {verdict_word(Verdict(cut['seen'], ''))}")
            rows.append([measure, tokens, *cells])
    return markdown_table(["measure", "tokens", "k = 2", "k = 3", "k = 4"], rows)


def r2_table(result: dict) -> str:
    """Return R² of predictions that know a_0 at most, and of Raptors: mean over layers."""
    rows = []
    for name, scores in result["r2"].items():
        means = [scores["mean"].get(group) for group in ("all", "cls", "patches")]
        rows.append([name, *("–" if mean is None else f"{mean:.3f}" for mean in means)])
    return markdown_table(["prediction", "R², all tokens", "R², cls", "R², patches"], rows)


def nulls_page(result: dict) -> str:
    """Return all tables, and the figures that decide the claims, in Markdown."""
    parts = ["# Phases against nulls", verdicts_table(result)]
    for claim, verdicts in judge(CLAIMS, result["networks"]):
        lines = [f"- {name}: {v.figures}" for name, v in verdicts.items() if v is not None]
        parts.append("\n".join([f"**{claim.sentence}.** Seen if: {claim.criterion}.", "", *lines]))
    return "\n\n".join([*parts, phases_table(result), r2_table(result)]) + "\n"


def draw_nulls(result: dict) -> Iterator[tuple[str, Figure]]:
    """Yield the figures with their names."""
    yield "phases", _draw_phases(result)
    yield "swaps", _draw_swaps(result)
    yield "growth", _draw_growth(result)


def _draw_matrix(figure: Figure, axis, matrix: np.ndarray, phases: list[int], **options) -> None:
    """Draw a matrix of layers, with lines where phases meet."""
    edge = len(matrix) + 0.5
    image = axis.imshow(matrix, extent=(0.5, edge, edge, 0.5), **options)
    figure.colorbar(image, ax=axis, shrink=0.8)
    axis.grid(False)
    for cut in boundaries(phases):
        axis.axhline(cut + 0.5, color=COLORS[2], lw=1)
        axis.axvline(cut + 0.5, color=COLORS[2], lw=1)


def _draw_phases(result: dict) -> Figure:
    """Draw a column a measure: distances, what turns don't explain, and cut shares over k."""
    teacher = result["networks"][result["teacher"]]["phases"]
    figure, axes = make_panels(3, len(teacher))
    for (top, middle, bottom), (measure, by_tokens) in zip(axes.T, teacher.items(), strict=True):
        # matrices
        found = by_tokens["all"]
        phases, similarity = found["cuts"]["3"]["phases"], np.array(found["similarity"])
        gain = similarity - np.array(found["independent_turns"])
        top.set_title(f"{measure}: distance; lines: k = 3", fontsize="small")
        _draw_matrix(figure, top, 1 - similarity, phases, cmap="Blues", vmin=0)
        middle.set_title("similarity − independent turns", fontsize="small")
        scale = {"vmin": -abs(gain).max(), "vmax": abs(gain).max()}
        _draw_matrix(figure, middle, gain, phases, cmap="RdBu_r", **scale)

        # cut shares, those of turns alone in grey
        ks, shares = list(found["cuts"]), [cut["shares"] for cut in found["cuts"].values()]
        low, _, high = np.transpose([share["random_order"] for share in shares])
        order = {"color": _GREY, "alpha": 0.3, "lw": 0, "label": "turns in random order"}
        bottom.fill_between(ks, low, high, **order)
        for null, style in (("independent", "--"), ("straight", ":")):
            values = [share[null] for share in shares]
            bottom.plot(ks, values, style, color=_GREY, label=f"{null} turns")
        own = [cut["cut_share"] for cut in found["cuts"].values()]
        values, spread = np.transpose([[one["value"], one["high"] - one["value"]] for one in own])
        bottom.errorbar(ks, values, spread, fmt="ok", capsize=3, label=result["teacher"])
        bottom.set_title("share of distance cut, by k", fontsize="small")
    axes[2, 0].legend(fontsize="x-small")
    return figure


def _draw_swaps(result: dict) -> Figure:
    """Draw all single swaps of the teacher, and their mean over |i − j|."""
    teacher = result["networks"][result["teacher"]]
    matrix = np.array(teacher["swaps"]["cosine"])
    phases = teacher["phases"]["raw cosine"]["all"]["cuts"]["3"]["phases"]
    figure, ((left, right),) = make_panels(1, 2)
    _draw_matrix(figure, left, matrix, phases, cmap="viridis", vmax=1)
    left.set_title("cosine of the last states; lines: k = 3", fontsize="small")
    left.set_xlabel("layer in its place")
    left.set_ylabel("layer replaced")

    # at equal distance
    phase, depth = np.repeat(np.arange(len(phases)), phases), np.arange(len(matrix))
    same, apart = phase[:, None] == phase, abs(depth[:, None] - depth)
    for label, kept, style in (("within a phase", same, "o-"), ("across", ~same, "s--")):
        there = np.unique(apart[kept & (apart > 0)])
        means = [matrix[kept & (apart == distance)].mean() for distance in there]
        right.plot(there, means, style, ms=4, label=label)
    right.set_title("mean cosine", fontsize="small")
    right.set_xlabel("|i − j|")
    right.legend(fontsize="x-small")
    return figure


def _draw_growth(result: dict) -> Figure:
    """Draw a column a token group: the growth of a push by network, and the teacher's pushes."""
    groups = result["networks"][result["teacher"]]["growth"]
    figure, axes = make_panels(2, len(groups), sharex=True)
    for (top, bottom), (group, pushes) in zip(axes.T, groups.items(), strict=True):
        # nulls are grey
        for number, (name, network) in enumerate(result["networks"].items()):
            kept = name == result["teacher"] or name in result["r2"]
            style = {"color": COLORS[number]} if kept else {"color": _GREY, "lw": 1}
            style["ls"] = ":" if name == "untrained" else "-"
            top.plot(network["growth"][group]["0"]["growth"], label=name, **style)
        top.set_title(f"{group}: log of the length of a push after layer 0", fontsize="small")
        for number, (start, figures) in enumerate(pushes.items()):
            x = int(start) + np.arange(len(figures["angle"]))
            label = "norms alone" if number == 0 else None
            bottom.plot(x, figures["norms_alone"], "--", color=_GREY, label=label)
            bottom.plot(x, figures["angle"], color=COLORS[number + 1], label=f"after {start}")
        bottom.set_title(f"{result['teacher']}, {group}: share of the angle left", fontsize="small")
    for axis in axes[:, 0]:
        axis.legend(fontsize="x-small")
    figure.supxlabel("layer")
    return figure

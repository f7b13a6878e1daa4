"""The report of a study: claims, tables and figures, made of its JSON files alone."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from evaluation.claims import Judged, claims_details, claims_table, judge
from evaluation.plotting import COLORS, GREY, line_style, make_panels
from raptor_hf.reports.tables import markdown_table
from raptor_hf.runs.files import read_json

from .claims import CLAIMS, drifts
from .measures import FIGURES, LAST, R2, cut_share, mean_in_words, table_of

_BYTES = 4  # of a stored parameter, float32
_LABELS = {
    "gap": ["k"],
    "partitions": ["teacher", "k", "partition"],
    "alternatives": ["kind", "k"],
    "training": ["teacher"],
}
_CAPTIONS = {
    "partitions": "R² of Raptors over the share of the layer distances that their partition cuts, "
    "left at k = 2. Grey: the share that it cuts of independent turns at the same speeds.",
    "alternatives": "What the same bytes, and the same compute of inference, can buy. All students "
    "had the same compute of training; dots are the students, lines join their means.",
}


def load_study(folder: str | Path) -> dict:
    """Read the files of a study: `maps`, and the rows of every finished experiment.

    Raises:
        FileNotFoundError: the folder has no `maps.json`.
    """
    study = read_json(Path(folder) / "maps.json")
    for name in _LABELS:
        path = Path(folder) / f"{name}.json"
        if path.exists():
            study[name] = read_json(path)["rows"]
    return study


def judge_study(study: dict) -> Judged:
    """Return the verdicts on all claims, under the name of the dataset."""
    return judge(CLAIMS, {study["about"]["dataset"]: study})


def write_report(folder: str | Path) -> str:
    """Write `study.md` and its figures into a study's folder; return the table of claims."""
    study = load_study(folder)
    judged, about = judge_study(study), study["about"]
    setting = (
        f"{about['num_images']} held-out images of {about['dataset']}, {about['units']:g} units of "
        "compute for every student."
    )
    # verdicts, then tables, then pictures
    parts = ["# When is a ViT block-recurrent?", setting]
    parts += [claims_table(judged), claims_details(judged)]
    for name in _LABELS:
        if name in study:
            parts += [f"## {name}", experiment_table(study[name], name)]
    draws = {"partitions": _draw_partitions, "alternatives": _draw_alternatives}
    for name, draw in draws.items():
        if study.get(name):
            figure = draw(study)
            figure.savefig(Path(folder) / f"{name}.png", dpi=110, metadata={"Software": None})
            parts.append(f"![{_CAPTIONS[name]}]({name}.png)\n\n{_CAPTIONS[name]}")
    (Path(folder) / "study.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return claims_table(judged)


def experiment_table(rows: list[dict], experiment: str) -> str:
    """Return the means over seeds of an experiment with their intervals, a row a kind."""
    names, costs = _LABELS[experiment], ["stored_parameters", "multiply_adds", "steps"]
    lines = []
    table = table_of(rows)
    if experiment == "partitions":  # every cut is a row
        cuts = table.partition == "cut"
        lengths = table.parts.map(lambda parts: "-".join(str(len(part)) for part in parts))
        table.loc[cuts, "partition"] = "cut " + lengths[cuts]
    for key, students in table.groupby(names, sort=False):
        cells = [mean_in_words(students[figure]) for figure in FIGURES]
        cells += [f"{students[cost].iloc[0]:,}" for cost in costs]
        lines.append([*map(str, key), *cells])
    return markdown_table([*names, *FIGURES, "parameters", "multiply-adds", "steps"], lines)


def _draw_partitions(study: dict) -> Figure:
    """Draw R² over cut share: a panel for the runs at k = 2, and one for all partitions."""
    table = table_of(study["partitions"])
    figure, ((left, right),) = make_panels(1, 2, sharey=True)
    names = list(dict.fromkeys(table.teacher))
    for (teacher, k), rows in table.groupby(["teacher", "k"], sort=False):
        distance = np.array(study["maps"][teacher]["distance"])
        means = rows.groupby("parts")[R2].mean()
        shares = [cut_share(distance, parts) for parts in means.index]
        turns = drifts(distance)["the speeds alone"]
        alone = [cut_share(turns, parts) for parts in means.index]
        style = {**line_style(names.index(teacher)), "ls": "", "label": f"{teacher}, k = {k}"}
        axis = left if k == 2 else right
        axis.plot(alone, means, **{**style, "color": GREY, "label": None})
        axis.plot(shares, means, **{**style, "color": COLORS[names.index(teacher) + (k - 2)]})
    for axis in (left, right):
        axis.set_xlabel("cut share")
        if axis.lines:
            axis.legend(fontsize=8)
    left.set_ylabel("R²")
    return figure


def _draw_alternatives(study: dict) -> Figure:
    """Draw R² against stored bytes and inference: every student is a dot, a kind a line."""
    table = table_of(study["alternatives"])
    table["blocks, MB (float32)"] = table.stored_parameters * _BYTES / 1e6
    table["multiply-adds of an image, millions"] = table.multiply_adds / 1e6
    size, inference = table.columns[-2:]
    figure, axes = make_panels(2, 2)
    gone = table.kind.str.contains("corrections|experts")
    for axis, (cost, name) in zip(
        axes.flat, [(size, R2), (size, LAST), (inference, LAST)], strict=False
    ):
        axis.plot(table[gone][cost], table[gone][name], ".", color=GREY, ms=4)
        for number, (kind, students) in enumerate(table[~gone].groupby("kind", sort=False)):
            if name == R2 and "last state" in kind:
                continue  # these students learn the last state alone
            means = students.groupby("stored_parameters")[[cost, name]].mean()
            axis.plot(students[cost], students[name], ".", color=COLORS[number], ms=4)
            axis.plot(means[cost], means[name], label=kind, **line_style(number))
        axis.set_title(name, fontsize="small")
        axis.set_xlabel(cost)
    axes[1, 1].set_axis_off()
    axes[1, 1].legend(*axes[0, 1].get_legend_handles_labels(), fontsize=9, loc="center left")
    return figure

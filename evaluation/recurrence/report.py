"""The report of a study: claims, tables and figures, made of its JSON files alone."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from evaluation.claims import Judged, claims_details, claims_table, judge
from evaluation.plotting import COLORS, line_style, make_panels
from raptor_hf.reports.tables import markdown_table
from raptor_hf.runs.files import read_json

from .claims import CLAIMS
from .measures import ACCURACY, FIGURES, LAST, R2, mean_in_words, table_of

_BYTES = 4  # of a stored parameter, float32
_LABELS = {
    "gap": ["k"],
    "partitions": ["k", "partition"],
    "alternatives": ["kind", "k"],
    "training": ["teacher"],
}
_CAPTIONS = {
    "gap": "ε, the mean distance of a Raptor's state from its teacher's, over the spread of the "
    "teacher's states. Bands: all seeds.",
    "alternatives": "What the same bytes can buy. All students had the same compute of training; "
    "dots are the students, lines join their means.",
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
    for name, draw in {"gap": _draw_gap, "alternatives": _draw_alternatives}.items():
        if name in study:
            figure = draw(study[name])
            figure.savefig(Path(folder) / f"{name}.png", dpi=110, metadata={"Software": None})
            parts.append(f"![{_CAPTIONS[name]}]({name}.png)\n\n{_CAPTIONS[name]}")
    (Path(folder) / "study.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return claims_table(judged)


def experiment_table(rows: list[dict], experiment: str) -> str:
    """Return the means over seeds of an experiment with their intervals, a row a kind."""
    names, costs = _LABELS[experiment], ["stored_parameters", "multiply_adds", "steps"]
    lines = []
    for key, students in table_of(rows).groupby(names, sort=False):
        cells = [mean_in_words(students[figure]) for figure in FIGURES]
        cells += [f"{students[cost].iloc[0]:,}" for cost in costs]
        lines.append([*map(str, key), *cells])
    return markdown_table([*names, *FIGURES, "parameters", "multiply-adds", "steps"], lines)


def _draw_gap(rows: list[dict]) -> Figure:
    """Draw ε over the layers, a line a k and a panel a token group."""
    groups, ks = list(rows[0]["to_spread"]), sorted({row["k"] for row in rows})
    figure, axes = make_panels(1, len(groups))
    for axis, group in zip(axes[0], groups, strict=True):
        for number, k in enumerate(ks):
            curves = np.array([row["to_spread"][group] for row in rows if row["k"] == k])
            x = np.arange(1, curves.shape[1] + 1)
            axis.plot(x, curves.mean(0), label=f"k = {k}", **line_style(number))
            axis.fill_between(x, curves.min(0), curves.max(0), color=COLORS[number], alpha=0.12)
        axis.set_title(group, fontsize="small")
        axis.set(xlabel="layer", ylim=(0, None))
    axes[0, 0].set_ylabel("ε / spread of the states")
    axes[0, 0].legend(fontsize="x-small")
    return figure


def _draw_alternatives(rows: list[dict]) -> Figure:
    """Draw R² and accuracy against stored bytes: every student is a dot, a kind a line."""
    table = table_of(rows)
    table["MB"] = table.stored_parameters * _BYTES / 1e6
    figure, axes = make_panels(1, 3)
    for axis, name in zip(axes[0], (R2, LAST, ACCURACY), strict=True):
        for number, (kind, students) in enumerate(table.groupby("kind", sort=False)):
            if name == R2 and "last state" in kind:
                continue  # these students learn the last state alone
            means = students.groupby("MB")[name].mean()
            axis.plot(students.MB, students[name], ".", color=COLORS[number], ms=3)
            axis.plot(means.index, means, label=kind, **line_style(number))
        axis.set_title(name, fontsize="small")
        axis.set_xlabel("blocks, MB (float32)")
    handles = axes[0, -1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right upper", fontsize="x-small")
    return figure

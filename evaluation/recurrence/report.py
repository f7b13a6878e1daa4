"""The report of a study: claims, tables and figures, made of its JSON files alone."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from evaluation.claims import Judged, claims_details, claims_table, judge
from evaluation.plotting import COLORS, line_style, make_panels
from raptor_hf.reports.tables import markdown_table
from raptor_hf.runs.files import read_json

from .claims import CLAIMS
from .experiments import EXPERIMENTS
from .measures import mean_in_words, values_of

_BYTES = 4  # of a stored parameter, float32
_LABELS = {
    "gap": ("k",),
    "partitions": ("k", "partition"),
    "alternatives": ("kind", "k"),
    "training": ("teacher",),
}
_FIGURES = {
    "r2": "R²",
    "median cls": "R² cls, median layer",
    "r2 patches": "R² patches",
    "last": "R², last state",
    "gap": "ε / spread",
    "accuracy": "accuracy",
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
    folder = Path(folder)
    if not (folder / "maps.json").exists():
        raise FileNotFoundError(f"{folder} has no maps.json: run evaluation.recurrence.study.")
    study = read_json(folder / "maps.json")
    for name in EXPERIMENTS:
        if (folder / f"{name}.json").exists():
            study[name] = read_json(folder / f"{name}.json")["rows"]
    return study


def judge_study(study: dict) -> Judged:
    """Return the verdicts on all claims, under the name of the dataset."""
    return judge(CLAIMS, {study["about"]["dataset"]: study})


def write_report(folder: str | Path) -> str:
    """Write `study.md` and its figures into a study's folder; return the table of claims."""
    folder = Path(folder)
    study = load_study(folder)
    judged = judge_study(study)
    table, about = claims_table(judged), study["about"]
    setting = (
        f"{about['num_images']} held-out images of {about['dataset']}, {about['units']:g} units of "
        "compute for every student."
    )
    # verdicts, then tables, then pictures
    parts = ["# When is a ViT block-recurrent?", setting, table, claims_details(judged)]
    for experiment in _LABELS:
        if study.get(experiment):
            parts += [f"## {experiment}", experiment_table(study[experiment], experiment)]
    for name, figure in draw(study):
        figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
        parts.append(f"![{_CAPTIONS[name]}]({name}.png)\n\n{_CAPTIONS[name]}")
    (folder / "study.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return table


def experiment_table(rows: list[dict], experiment: str) -> str:
    """Return the means and 95 % intervals over seeds of an experiment, a row a kind of student."""
    names, lines = _LABELS[experiment], []
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        label = dict(zip(names, key, strict=True))
        first = next(row for row in rows if label.items() <= row.items())
        cells = [mean_in_words(values_of(rows, figure, **label)) for figure in _FIGURES]
        cost = [f"{first['stored_parameters']:,}", f"{first['multiply_adds']:,}"]
        lines.append([*map(str, key), *cells, *cost, str(first["steps"])])
    heading = [*names, *_FIGURES.values(), "parameters", "multiply-adds", "steps"]
    return markdown_table(heading, lines)


def draw(study: dict) -> Iterator[tuple[str, Figure]]:
    """Yield the name and the figure of the experiments that are drawn."""
    for name, figure in {"gap": _draw_gap, "alternatives": _draw_alternatives}.items():
        if study.get(name):
            yield name, figure(study[name])


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
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    figure, axes = make_panels(1, 3)
    for axis, name in zip(axes[0], ("r2", "last", "accuracy"), strict=True):
        for number, kind in enumerate(kinds):
            own = [row for row in rows if row["kind"] == kind]
            if name == "r2" and "last state" in kind:
                continue  # these students learn the last state alone
            # a dot a student, a line through the means over seeds
            sizes, means = [], []
            for k in sorted({row["k"] for row in own}):
                values = values_of(own, name, k=k)
                if len(values):
                    size = next(row["stored_parameters"] for row in own if row["k"] == k)
                    sizes.append(size * _BYTES / 1e6)
                    means.append(values.mean())
                    axis.plot([sizes[-1]] * len(values), values, ".", color=COLORS[number], ms=3)
            axis.plot(sizes, means, label=kind, **line_style(number))
        axis.set_title(_FIGURES[name], fontsize="small")
        axis.set_xlabel("blocks, MB (float32)")
    handles = axes[0, -1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right upper", fontsize="x-small")
    return figure

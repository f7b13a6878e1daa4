"""The report of a study: claims, tables and figures, made of its JSON files alone."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from evaluation.claims import claims_details, claims_table, judge
from evaluation.plotting import COLORS, line_style, make_panels
from raptor_hf.reports.tables import markdown_table
from raptor_hf.runs.files import read_json

from .claims import CLAIMS, drop_rate_table
from .experiments import EXPERIMENTS
from .measures import interval, mean_in_words, values_of

_BYTES = 4  # of a stored parameter, float32
_LABELS = {
    "gap": ("k",),
    "partitions": ("k", "partition"),
    "alternatives": ("kind", "k"),
    "training": ("teacher",),
}
_FIGURES = {
    "r2": "R²",
    "r2 cls": "R² cls",
    "r2 patches": "R² patches",
    "last": "R², last state",
    "gap": "ε / spread",
    "accuracy": "accuracy",
}
_CAPTIONS = {
    "similarity": "Cosine similarity of the layers of every teacher, means over images, cls and "
    "mean patch; white: its three phases.",
    "gap": "ε, the mean distance of a Raptor's state from its teacher's, over the spread of the "
    "teacher's states. Bands: all seeds.",
    "partitions": "Raptors on different partitions of the same teacher; bars are 95 % intervals "
    "over seeds, dots the students.",
    "alternatives": "What the same bytes can buy. All students had the same compute of training; "
    "dots are the students, lines join their means.",
    "training": "Teachers of other drop rates.",
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


def judge_study(study: dict) -> list[dict]:
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
    """Yield the name and the figure of the maps, and of every experiment that a study has."""
    yield "similarity", _draw_similarity(study["maps"])
    figures = {
        "gap": _draw_gap,
        "partitions": _draw_partitions,
        "alternatives": _draw_alternatives,
    }
    for name, figure in figures.items():
        if study.get(name):
            yield name, figure(study[name])
    if len(drop_rate_table(study).get("drop rate", ())):
        yield "training", _draw_training(drop_rate_table(study))


def _draw_similarity(maps: dict) -> Figure:
    """Draw the matrix of cosine similarity of every teacher, with its three phases."""
    columns = min(4, len(maps))
    figure, axes = make_panels(-(-len(maps) // columns), columns)
    for axis in axes.flat:
        axis.grid(False)
        axis.set_visible(False)
    for axis, (name, found) in zip(axes.flat, maps.items(), strict=False):
        axis.set_visible(True)
        layers = len(found["distance"])
        extent = (0.5, layers + 0.5, layers + 0.5, 0.5)
        similarity = 1 - np.array(found["distance"])
        image = axis.imshow(similarity, vmin=0, vmax=1, cmap="viridis", extent=extent)
        for cut in np.cumsum(found["phases"].get("3", []))[:-1] + 0.5:
            axis.axhline(cut, color="white", lw=1)
            axis.axvline(cut, color="white", lw=1)
        rate = found.get("drop_path_rate")
        axis.set_title(name if rate is None else f"{name} (drop rate {rate:g})", fontsize="small")
    figure.colorbar(image, ax=axes, label="cosine of two layers", shrink=0.6)
    return figure


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


def _draw_partitions(rows: list[dict]) -> Figure:
    """Draw R² and accuracy of kinds of partitions with 95 % intervals; dots are the students."""
    kinds, ks = list(dict.fromkeys(r["partition"] for r in rows)), sorted({r["k"] for r in rows})
    figure, axes = make_panels(1, 2)
    for axis, name in zip(axes[0], ("r2", "accuracy"), strict=True):
        for number, kind in enumerate(kinds):
            for place, k in enumerate(ks):
                values = values_of(rows, name, k=k, partition=kind)
                if not len(values):
                    continue
                x = place + 0.2 * number - 0.3
                mean, width = interval(values)
                label = kind if place == 0 else None
                axis.plot([x] * len(values), values, ".", color=COLORS[number], alpha=0.4, ms=4)
                error = 0 if np.isnan(width) else width
                axis.errorbar(x, mean, error, capsize=3, label=label, **line_style(number))
        axis.set_xticks(range(len(ks)), [f"k = {k}" for k in ks])
        axis.set_title(_FIGURES[name], fontsize="small")
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


def _draw_training(table: dict[str, np.ndarray]) -> Figure:
    """Draw figures of the teachers and their students over the drop rate, a panel a figure."""
    rates = table.pop("drop rate")
    figure, axes = make_panels(2, -(-len(table) // 2))
    for axis in axes.flat[len(table) :]:
        axis.set_visible(False)
    for axis, (name, values) in zip(axes.flat, table.items(), strict=False):
        distinct = sorted(set(rates))
        axis.plot(distinct, [values[rates == rate].mean() for rate in distinct], **line_style(1))
        axis.plot(rates, values, ".", color=COLORS[1], alpha=0.4, ms=4)
        axis.set_title(name, fontsize="small")
        axis.set_xlabel("drop rate of the teacher")
    return figure

"""The report of a study: claims, tables and figures, made of its JSON files alone."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from evaluation.plotting import line_style, make_panels
from evaluation.verdicts import Judged, claims_details, claims_table, judge
from raptor_hf.reports.tables import markdown_table
from raptor_hf.runs.files import read_json

from .claims import CLAIMS, drifts
from .measures import FIGURES, R2, cut_share, mean_in_words, table_of

_LABELS = {
    "gap": ["k"],
    "partitions": ["teacher", "k", "partition"],
    "training": ["teacher"],
}
_CAPTION = (
    "R² of Raptors over the share of the layer distances that their partition cuts; on the right "
    "over that of independent turns, which know the speeds of the layers alone."
)


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
    # verdicts, then tables, then the picture
    parts = ["# When is a ViT block-recurrent?", setting]
    parts += [claims_table(judged), claims_details(judged)]
    for name in _LABELS:
        if name in study:
            parts += [f"## {name}", experiment_table(study[name], name)]
    if study.get("partitions"):
        picture, figure = Path(folder) / "partitions.png", _draw_partitions(study)
        figure.savefig(picture, dpi=110, metadata={"Software": None})
        parts.append(f"![{_CAPTION}]({picture.name})\n\n{_CAPTION}")
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
    """Draw R² over the cut share of the layer distances, and over that of the speeds alone."""
    table = table_of(study["partitions"])
    figure, ((left, right),) = make_panels(1, 2, sharex=True, sharey=True)
    for number, ((name, k), rows) in enumerate(table.groupby(["teacher", "k"], sort=False)):
        distance = np.array(study["maps"][name]["distance"])
        means = rows.groupby("parts")[R2].mean()
        style = {**line_style(number), "ls": "", "label": f"{name}, k = {k}"}
        for axis, cut in ((left, distance), (right, drifts(distance)["the speeds alone"])):
            axis.plot([cut_share(cut, parts) for parts in means.index], means, **style)
    left.set(xlabel="cut share of the distances", ylabel="R²")
    right.set_xlabel("cut share of independent turns")
    left.legend(fontsize=8)
    return figure

"""Tables in Markdown, made from result files alone: one JSON per (model, task, seed)."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..runs.files import read_json


class Column(NamedTuple):
    """One figure in tables: its key among a result's metrics, heading, scale and decimals."""

    metric: str
    heading: str
    scale: float
    digits: int


COLUMNS = {
    "classification": Column("accuracy", "accuracy (%)", 100, 1),
    "segmentation": Column("miou", "mIoU (%)", 100, 1),
    "depth": Column("rmse_m", "depth RMSE (m)", 1, 3),
}
_MORE_COLUMNS = (
    ("classification", Column("knn/accuracy", "k-NN accuracy (%)", 100, 1)),
    ("segmentation", Column("original_size/miou", "mIoU at the original size (%)", 100, 1)),
    ("r2", Column("mean/all", "R², all tokens", 1, 3)),
    ("r2", Column("mean/cls", "R², cls", 1, 3)),
    ("r2", Column("mean/patches", "R², patches", 1, 3)),
    ("r2", Column("reference", "R² (reference's definition)", 1, 3)),
)
_SHARE = "of the teacher's (%)"
ABLATION = {
    "teacher_forcing": "teacher forcing only",
    "autoregressive": "+ autoregressive",
    "depth_scaling": "+ depth scaling",
    "weighted_cls": "+ weighted cls (last block)",
    "second_stage": "+ second stage",
    "tuned_classifier": "+ tuned classifier",
}
_SAME_IMAGES = ("dataset", "split", "num_images", "images_sha256")


def load_results(folders: list[str | Path]) -> list[dict]:
    """Load all result files (`*.json`) of some folders.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a file is no result; two hold the same (model, task, seed), which would count
            twice; or results of a task are about different images and can't be compared.
    """
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.json"))]
    if not files:
        raise FileNotFoundError(f"No result files (*.json) in {', '.join(map(str, folders))}.")
    results, seen = [], {}
    for file in files:
        result = read_json(file)
        if not {"model", "task", "seed", "metrics"} <= set(result):
            raise ValueError(f"{file} is no result file: it lacks model, task, seed or metrics.")
        key = (result["model"], result["task"], result["seed"])
        if key in seen:
            raise ValueError(f"{seen[key]} and {file} both hold a result of {key}: leave one out.")
        seen[key] = file
        results.append(result)

    # results of earlier versions lack some of these keys
    for task, of_task in pd.DataFrame(results).groupby("task"):
        for key in of_task.columns.intersection(_SAME_IMAGES):
            values = of_task[key].dropna().unique().tolist()
            if len(values) > 1:
                raise ValueError(
                    f"The results of {task} are about other images: {key} is {values[0]!r} and "
                    f"{values[1]!r}. Make a report for each, or judge all on the same images."
                )
    return results


def values_of(results: list[dict], model: str, task: str, *keys: str) -> np.ndarray:
    """Return one figure of a model over its seeds: (seeds,), or (seeds, L) for figures per layer.

    Results without the figure are left out.
    """
    values = []
    for result in sorted(results, key=lambda result: result["seed"]):
        if (result["model"], result["task"]) == (model, task):
            value = result["metrics"]
            for key in keys:
                value = (value or {}).get(key)
            if value is not None:
                values.append(value)
    return np.array(values, dtype=float)  # NaN where a layer has no R²


def mean_std(values: np.ndarray, digits: int) -> str:
    """Return `mean ± std` over seeds, the only value, or a dash."""
    if not len(values):
        return "–"
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std(ddof=1):.{digits}f}"


def markdown_table(heading: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def model_names(results: list[dict]) -> list[str]:
    """Return the models in order: the teacher, other baselines, Raptors by their blocks."""
    phases = {result["model"]: result["phases"] or () for result in results}
    return sorted(phases, key=lambda name: (len(phases[name]), name != "teacher", name))


def results_table(results: list[dict]) -> str:
    """Return the main table in Markdown, a row a model, `mean ± std` over model seeds.

    Args:
        results: from `load_results`; columns without any figure are left out.

    Raises:
        ValueError: no results of the teacher, which is the 100 % row.
    """
    names = model_names(results)
    if "teacher" not in names:
        raise ValueError(f"The table needs results of the teacher; got only {', '.join(names)}.")
    facts = {result["model"]: result for result in results}
    # the teacher's, for the shares
    whole = values_of(results, "teacher", "classification", "accuracy")
    layers = facts["teacher"]["block_parameters"]
    # a row a model
    rows = []
    for name in names:
        row = {"model": name, "phases": str(facts[name]["phases"] or "–")}
        for task, column in (*COLUMNS.items(), *_MORE_COLUMNS):
            values = values_of(results, name, task, *column.metric.split("/"))
            row[column.heading] = mean_std(column.scale * values, column.digits)
            if column == COLUMNS["classification"]:
                row[_SHARE] = "–"
                if len(values) and len(whole):
                    row[_SHARE] = f"{100 * values.mean() / whole.mean():.1f}"
        # size of the blocks
        parameters = facts[name]["block_parameters"]
        if parameters:
            row["parameters of the blocks"] = f"{parameters:,}"
            row["of the teacher's layers (%)"] = f"{100 * parameters / layers:.1f}"
        rows.append(row)
    return _markdown(rows)


def published_table(published: dict) -> str:
    """Return the published figures in Markdown, a row a model, marked as published."""
    means = {(r["model"], r["task"]): r["mean"] for r in published["results"]}
    whole, rows = means[published["teacher"], "classification"], {}
    # a row a model, a column a task
    for result in published["results"]:
        name, column = result["model"], COLUMNS[result["task"]]
        row = rows.setdefault(name, {"model": f"{name} (published)"})
        row["phases"] = str(result["phases"] or "–")
        row[column.heading] = f"{column.scale * result['mean']:.{column.digits}f}"
        if result["std"] is not None:
            row[column.heading] += f" ± {column.scale * result['std']:.{column.digits}f}"
        if result["task"] == "classification":
            row[_SHARE] = f"{100 * result['mean'] / whole:.1f}"
    return _markdown(list(rows.values()))


def _markdown(rows: list[dict]) -> str:
    """Return rows as a table in Markdown: a dash for what is missing, no column of dashes."""
    table = pd.DataFrame(rows).replace("–", np.nan).dropna(axis="columns", how="all").fillna("–")
    return markdown_table(list(table), table.to_numpy().tolist())


def ablation_table(results: list[dict], published: dict) -> str:
    """Return the gain of each part of the recipe, a row a part, in Markdown.

    Args:
        results: of models that are named by the keys of `ABLATION`.
        published: `evaluation/results/published.json`, for a column of the published accuracies.

    Raises:
        ValueError: rows of the ablation are missing, for some of the seeds or all.
    """
    heading = ["step", "accuracy (%)", "gain (points)", "R², all tokens", "R², cls"]
    rows, means = [], []
    seeds = {result["seed"] for result in results}
    # a row a step, with its gain over the step before
    for name, label in ABLATION.items():
        accuracy = 100 * values_of(results, name, "classification", "accuracy")
        if len(accuracy) < max(1, len(seeds)):
            raise ValueError(
                f"The ablation lacks results for {name} (seeds {sorted(seeds)}): let "
                "training/ablate.sh finish."
            )
        means.append(accuracy.mean())
        gain = ""
        if rows:
            gain = f"{means[-1] - means[-2]:+.1f}"
        row = [label, mean_std(accuracy, 1), gain]
        for group in ("all", "cls"):
            row.append(mean_std(values_of(results, name, "r2", "mean", group), 3))
        rows.append(row)
    # the published figures beside it
    heading.append("published, ImageNet-1k (%)")
    figures = {step["step"]: f"{100 * step['mean']:.1f}" for step in published["ablation"]}
    for name, row in zip(ABLATION, rows, strict=True):
        row.append(figures[name])
    return markdown_table(heading, rows)

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
_R2_COLUMNS = (
    Column("mean/all", "R², all tokens", 1, 3),
    Column("mean/cls", "R², cls", 1, 3),
    Column("mean/patches", "R², patches", 1, 3),
    Column("reference", "R² (reference's definition)", 1, 3),
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
    results = [read_json(file) for file in files]
    for file, result in zip(files, results, strict=True):
        if not {"model", "task", "seed", "metrics"} <= set(result):
            raise ValueError(
                f"{file} is no result file: expected the keys model, task, seed and metrics."
            )

    table = pd.DataFrame(results)
    twice = table.duplicated(["model", "task", "seed"], keep=False)
    if twice.any():
        first, second = [file for file, same in zip(files, twice, strict=True) if same][:2]
        raise ValueError(
            f"{first} and {second} both hold a result of one model, task and seed. Leave one of "
            "the folders out."
        )

    # results of earlier versions lack some of these keys
    for task, of_task in table.groupby("task"):
        for key in table.columns.intersection(_SAME_IMAGES):
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
    facts = {result["model"]: result for result in results}
    return sorted(
        facts, key=lambda name: (len(facts[name]["phases"] or ()), name != "teacher", name)
    )


def results_table(results: list[dict], published: dict | None = None) -> str:
    """Return the main table in Markdown, a row a model, `mean ± std` over model seeds.

    Args:
        results: from `load_results`; columns without any figure are left out.
        published: `evaluation/results/published.json`; its rows follow, marked as published.

    Raises:
        ValueError: no results of the teacher, which is the 100 % row.
    """
    names = model_names(results)
    if "teacher" not in names:
        raise ValueError(f"The table needs results of the teacher; got only {', '.join(names)}.")
    seeds = pd.json_normalize(results, sep="/", max_level=2)
    facts = seeds.drop_duplicates("model", keep="last").set_index("model")
    table = pd.DataFrame({"phases": facts["phases"]}, index=names)

    # figures of tasks, and of states
    columns = [*COLUMNS.items(), *(("r2", column) for column in _R2_COLUMNS)]
    for task, column in columns:
        figures = seeds[seeds["task"] == task].set_index("model")
        if (key := f"metrics/{column.metric}") in figures:
            figures = figures[key].dropna().groupby("model")
            table[column.heading] = figures.agg(
                lambda values, c=column: mean_std(c.scale * values.to_numpy(), c.digits)
            )
            if task == "classification":
                shares = 100 * figures.mean() / figures.mean().get("teacher", np.nan)
                table[_SHARE] = shares.map("{:.1f}".format)

    # sizes
    parameters = facts["block_parameters"].dropna()
    shares = 100 * parameters / parameters["teacher"]
    table["parameters of the blocks"] = parameters.map("{:,.0f}".format)
    table["of the teacher's layers (%)"] = shares.map("{:.1f}".format)
    if published:
        table = pd.concat([table, published_figures(published)])
    return _markdown(table)


def published_figures(published: dict) -> pd.DataFrame:
    """Return the published figures as text, a row a model, marked as published."""
    results = pd.DataFrame(published["results"])
    names = list(results["model"].unique())
    phases = results.drop_duplicates("model").set_index("model")["phases"]
    table = pd.DataFrame({"phases": phases}, index=names)
    for task, column in COLUMNS.items():
        of_task = results[results["task"] == task].set_index("model")
        mean, std = of_task["mean"], of_task["std"].dropna()
        text = (column.scale * mean).map(f"{{:.{column.digits}f}}".format)
        spread = (column.scale * std).map(f" ± {{:.{column.digits}f}}".format)
        table[column.heading] = text + spread.reindex(text.index, fill_value="")
        if task == "classification":
            table[_SHARE] = (100 * mean / mean[published["teacher"]]).map("{:.1f}".format)
    return table.rename(index="{} (published)".format)


def published_table(published: dict) -> str:
    """Return the table of published figures in Markdown."""
    return _markdown(published_figures(published))


def _markdown(table: pd.DataFrame) -> str:
    """Return a table of texts in Markdown, with dashes for missing ones."""
    # columns of tasks come first, also those that only published models have
    first = ["phases", COLUMNS["classification"].heading, _SHARE]
    first += [COLUMNS["segmentation"].heading, COLUMNS["depth"].heading]
    order = pd.Index(first).intersection(table.columns, sort=False)
    table = table[order.append(table.columns.difference(order, sort=False))].astype(object)
    cells = table.where(table.notna(), "–").astype(str).reset_index(names="model")
    return markdown_table(list(cells.columns), cells.to_numpy().tolist())


def probes_table(results: list[dict]) -> str:
    """Return the table of probes: the last epoch, the best of all epochs, and k-NN.

    The best epoch is picked on the images that it is reported for, as the reference does: it
    flatters, and is here for comparison.
    """
    probed = [result for result in results if "best_on_validation" in result]
    seeds = pd.json_normalize(probed, sep="/", max_level=2)
    rows = []
    for name in model_names(results):
        for task, column in COLUMNS.items():
            probes = seeds[(seeds["model"] == name) & (seeds["task"] == task)]
            if probes.empty:
                continue
            row = [name, column.heading]
            for figures in ("metrics", "best_on_validation/metrics", "knn"):
                # only classification has k-NN
                values = probes.get(f"{figures}/{column.metric}", pd.Series(dtype=float)).dropna()
                row.append(mean_std(column.scale * values.to_numpy(), column.digits))
            row.insert(-1, ", ".join(probes["best_on_validation/epoch"].astype(str)))
            row.append(", ".join(sorted(probes["selected/pooling"].unique())))
            rates = probes["selected/learning_rate"].map("{:g}".format)
            row.append(", ".join(sorted(rates.unique())))
            rows.append(row)
    heading = ["model", "figure", "last epoch", "best on validation", "in epoch", "k-NN"]
    return markdown_table([*heading, "head on", "learning rate"], rows)


def ablation_table(results: list[dict], published: dict | None = None) -> str:
    """Return the gain of each part of the recipe, a row a part, in Markdown.

    Args:
        results: of models that are named by the keys of `ABLATION`.
        published: adds a column with the published accuracies.

    Raises:
        ValueError: rows of the ablation are missing, for some of the seeds or all.
    """
    # every row needs a result of every seed
    judged = pd.DataFrame(results, columns=["model", "task", "seed"])
    judged = judged[judged["model"].isin(ABLATION) & (judged["task"] == "classification")]
    seeds = sorted(judged["seed"].unique().tolist())
    counts = judged["model"].value_counts()
    missing = [name for name in ABLATION if counts.get(name, 0) < max(1, len(seeds))]
    if missing:
        raise ValueError(
            f"The ablation lacks results for {', '.join(missing)} (seeds {seeds}): let "
            "training/ablate.sh finish."
        )
    heading = ["step", "accuracy (%)", "gain (points)", "R², all tokens", "R², cls"]
    if published:
        heading.append("published, ImageNet-1k (%)")
    rows, before = [], None
    for name, label in ABLATION.items():
        accuracy = 100 * values_of(results, name, "classification", "accuracy")
        gain = "" if before is None else f"{accuracy.mean() - before:+.1f}"
        before = accuracy.mean()
        cells = [label, mean_std(accuracy, 1), gain]
        for group in ("all", "cls"):
            cells.append(mean_std(values_of(results, name, "r2", "mean", group), 3))
        if published:
            step = next(row for row in published["ablation"] if row["step"] == name)
            cells.append(f"{100 * step['mean']:.1f}")
        rows.append(cells)
    return markdown_table(heading, rows)

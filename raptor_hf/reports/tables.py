"""Tables in Markdown, made from result files alone: one JSON per (model, task, seed)."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..runs.files import read_json


class _Column(NamedTuple):
    """How a task's figure is shown: the key among a result's metrics, heading, scale, decimals."""

    metric: str
    heading: str
    scale: float
    digits: int


COLUMNS = {
    "classification": _Column("accuracy", "accuracy (%)", 100, 1),
    "segmentation": _Column("miou", "mIoU (%)", 100, 1),
    "depth": _Column("rmse_m", "depth RMSE (m)", 1, 3),
}
# headings of the R² columns: where a result file has them
_R2_COLUMNS = {
    "R², all tokens": ("mean", "all"),
    "R², cls": ("mean", "cls"),
    "R², patches": ("mean", "patches"),
    "R² (reference's definition)": ("reference",),
}
ABLATION = {
    "teacher_forcing": "teacher forcing only",
    "autoregressive": "+ autoregressive",
    "depth_scaling": "+ depth scaling",
    "weighted_cls": "+ weighted cls (last block)",
    "second_stage": "+ second stage",
    "tuned_classifier": "+ tuned classifier",
}

# the images that a result is about; results of earlier versions lack some of it
_JUDGED_ON = ("dataset", "split", "num_images", "images_sha256")


def load_results(folders: list[str | Path]) -> list[dict]:
    """Load all result files (`*.json`) of some folders.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a file is no result, two hold the same (model, task, seed), which would count
            twice, or a task was judged on several datasets or other images, whose figures can't
            be compared.
    """
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.json"))]
    if not files:
        raise FileNotFoundError(f"No result files (*.json) in {', '.join(map(str, folders))}.")
    read: dict[tuple, Path] = {}
    judged_on: dict[str, dict] = {}
    results = [read_json(file) for file in files]
    for file, result in zip(files, results, strict=True):
        if not {"model", "task", "seed", "metrics"} <= set(result):
            raise ValueError(
                f"{file} is no result file: expected the keys model, task, seed and metrics."
            )
        key = (result["model"], result["task"], result["seed"])
        if key in read:
            raise ValueError(
                f"{read[key]} and {file} both hold the result of model, task, seed = {key}. "
                "Leave one of the folders out."
            )
        read[key] = file
        data = {name: result.get(name) for name in _JUDGED_ON}
        others = judged_on.setdefault(result["task"], data)
        differing = [
            f"{name} {data[name]!r}, not {others[name]!r}"
            for name in _JUDGED_ON
            if None not in (data[name], others[name]) and data[name] != others[name]
        ]
        if differing:
            raise ValueError(
                f"{file} was judged on other images than the other results of {result['task']}: "
                f"{'; '.join(differing)}. Make a report for each, or judge all on the same ones."
            )
    return results


def values_of(results: list[dict], model: str, task: str, *keys: str) -> np.ndarray:
    """Return one figure of a model over its seeds: (seeds,), or (seeds, L) for figures per layer.

    Results that lack the figure are left out.
    """
    values = []
    for result in sorted(results, key=lambda result: result["seed"]):
        if (result["model"], result["task"]) == (model, task):
            value = result["metrics"]
            for key in keys:
                value = value.get(key) if value is not None else None
            if value is not None:
                values.append(value)
    return np.array(values)


def mean_std(values: np.ndarray, digits: int) -> str:
    """Return `mean ± std` over seeds, the one value that there is, or a dash."""
    if not len(values):
        return "–"
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std(ddof=1):.{digits}f}"


def markdown_table(heading: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def model_names(results: list[dict]) -> list[str]:
    """Order models: the teacher, other baselines, the Raptors by their number of blocks."""
    facts = {result["model"]: result for result in results}
    return sorted(
        facts, key=lambda name: (len(facts[name]["phases"] or ()), name != "teacher", name)
    )


def results_table(results: list[dict], published: dict | None = None) -> str:
    """Return the main table in Markdown, a row a model, `mean ± std` over model seeds.

    Args:
        results: as from `load_results`; columns without any figure are left out.
        published: `evaluation/results/published.json`; its rows follow, marked as published.

    Raises:
        ValueError: no results of the teacher, which is the 100 % row.
    """
    facts = {result["model"]: result for result in results}
    names = model_names(results)
    tasks = [task for task in COLUMNS if any(result["task"] == task for result in results)]
    if published:
        tasks = [task for task in COLUMNS if task in tasks or _published_value(published, task)]
    r2 = {
        heading: keys
        for heading, keys in _R2_COLUMNS.items()
        if any(len(values_of(results, name, "r2", *keys)) for name in names)
    }
    heading = ["model", "phases"]
    for task in tasks:
        heading.append(COLUMNS[task].heading)
        heading += ["of the teacher's (%)"] if task == "classification" else []
    heading += [*r2, "parameters of the blocks", "of the teacher's layers (%)"]
    if "teacher" not in facts:
        raise ValueError(f"The table needs results of the teacher; got only {', '.join(names)}.")
    judged = values_of(results, "teacher", "classification", "accuracy")
    teacher = judged.mean() if len(judged) else np.nan
    layers = facts["teacher"]["block_parameters"]
    rows = []
    for name in names:
        cells = [name, "–" if facts[name]["phases"] is None else str(facts[name]["phases"])]
        for task in tasks:
            column = COLUMNS[task]
            values = values_of(results, name, task, column.metric)
            cells.append(mean_std(column.scale * values, column.digits))
            if task == "classification":
                cells.append(f"{100 * values.mean() / teacher:.1f}" if len(values) else "–")
        cells += [mean_std(values_of(results, name, "r2", *keys), 3) for keys in r2.values()]
        parameters = facts[name]["block_parameters"]
        size = [f"{parameters:,}", f"{100 * parameters / layers:.1f}"] if parameters else ["–", "–"]
        rows.append([*cells, *size])
    if published:
        rows += published_rows(published, tasks, len(heading))
    return markdown_table(heading, rows)


def probes_table(results: list[dict]) -> str:
    """Return, for every probe, the last epoch, the best of all epochs, and k-NN.

    The best epoch is picked on the images that it is reported for, as the reference does: it
    flatters, and is here for comparison.
    """
    rows = []
    for name in model_names(results):
        for task, column in COLUMNS.items():
            last = values_of(results, name, task, column.metric)
            own_results = [r for r in results if (r["model"], r["task"]) == (name, task)]
            best = [r["best_on_validation"] for r in own_results if "best_on_validation" in r]
            if not best:
                continue
            figures = np.array([point["metrics"][column.metric] for point in best])
            knn = np.array([r["knn"][column.metric] for r in own_results if "knn" in r])
            selected = sorted({r["selected"]["pooling"] for r in own_results})
            rates = sorted({f"{r['selected']['learning_rate']:g}" for r in own_results})
            columns = [mean_std(column.scale * v, column.digits) for v in (last, figures, knn)]
            epochs = ", ".join(str(point["epoch"]) for point in best)
            columns.insert(2, epochs)
            rows.append([name, column.heading, *columns, ", ".join(selected), ", ".join(rates)])
    heading = ["model", "figure", "last epoch", "best on validation", "in epoch", "k-NN"]
    return markdown_table([*heading, "head on", "learning rate"], rows)


def _published_value(published: dict, task: str, model: str | None = None) -> dict | None:
    """Return the published figure of a task, of a model or of the first one that has it."""
    value = (
        row for row in published["results"] if row["task"] == task and model in (None, row["model"])
    )
    return next(value, None)


def published_rows(published: dict, tasks: list[str], width: int) -> list[list[str]]:
    """Return rows of the main table for published models, marked as such."""
    rows = []
    teacher = _published_value(published, "classification", published["teacher"])["mean"]
    for model in dict.fromkeys(row["model"] for row in published["results"]):
        phases = next(row["phases"] for row in published["results"] if row["model"] == model)
        cells = [f"{model} (published)", "–" if phases is None else str(phases)]
        for task in tasks:
            row, column = _published_value(published, task, model), COLUMNS[task]
            spread = ""
            if row and row["std"] is not None:
                spread = f" ± {column.scale * row['std']:.{column.digits}f}"
            cells.append(f"{column.scale * row['mean']:.{column.digits}f}{spread}" if row else "–")
            if task == "classification":
                cells.append(f"{100 * row['mean'] / teacher:.1f}" if row else "–")
        rows.append(cells + ["–"] * (width - len(cells)))
    return rows


def ablation_table(results: list[dict], published: dict | None = None) -> str:
    """Return what each part of the recipe adds, a row a part, in Markdown.

    Args:
        results: of models that are named by the keys of `ABLATION`.
        published: adds a column with the published accuracies.

    Raises:
        ValueError: rows of the ablation are missing, for some of the seeds or all.
    """
    models = {(r["model"], r["seed"]) for r in results if r["task"] == "classification"}
    seeds = sorted({seed for model, seed in models if model in ABLATION})
    missing = [
        name for name in ABLATION if any((name, seed) not in models for seed in seeds or [0])
    ]
    if missing:
        raise ValueError(
            f"The ablation lacks results for {', '.join(missing)} (seeds {seeds}): let "
            "training/ablate.sh finish."
        )
    heading = ["step", "accuracy (%)", "gain (points)", "R², all tokens", "R², cls"]
    heading += ["published, ImageNet-1k (%)"] if published else []
    rows, before = [], None
    for name, label in ABLATION.items():
        accuracy = 100 * values_of(results, name, "classification", "accuracy")
        gain = "" if before is None else f"{accuracy.mean() - before:+.1f}"
        before = accuracy.mean()
        r2 = [values_of(results, name, "r2", "mean", group) for group in ("all", "cls")]
        cells = [label, mean_std(accuracy, 1), gain, *(mean_std(values, 3) for values in r2)]
        if published:
            step = next(row for row in published["ablation"] if row["step"] == name)
            cells.append(f"{100 * step['mean']:.1f}")
        rows.append(cells)
    return markdown_table(heading, rows)

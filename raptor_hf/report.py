"""Tables and reports, made from result files alone; the pictures are drawn by `figures`."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from .figures import plot_bars, plot_layer_distance, plot_r2_per_layer
from .runs import read_json

__all__ = ["ablation_table", "load_results", "plot_layer_distance", "results_table", "write_report"]


class Task(NamedTuple):
    """How a task's figure is shown: the key among a result's metrics, heading, scale, decimals."""

    metric: str
    heading: str
    scale: float
    digits: int


TASKS = {
    "classification": Task("accuracy", "accuracy (%)", 100, 1),
    "segmentation": Task("miou", "mIoU (%)", 100, 1),
    "depth": Task("rmse_m", "depth RMSE (m)", 1, 3),
}
# headings of the R² columns: where a result file has them
R2_COLUMNS = {
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


def load_results(folders: list[str | Path]) -> list[dict]:
    """All result files (`*.json`) of some folders.

    Raises:
        FileNotFoundError: there are none.
    """
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.json"))]
    if not files:
        raise FileNotFoundError(f"No result files (*.json) in {', '.join(map(str, folders))}.")
    return [read_json(file) for file in files]


def values_of(results: list[dict], model: str, task: str, *keys: str) -> np.ndarray:
    """One figure of a model over its seeds: (seeds,), or (seeds, L) for figures per layer.

    Results that lack the figure are left out.
    """
    found = []
    for result in sorted(results, key=lambda result: result["seed"]):
        if (result["model"], result["task"]) == (model, task):
            value = result["metrics"]
            for key in keys:
                value = value.get(key) if value is not None else None
            if value is not None:
                found.append(value)
    return np.array(found)


def mean_std(values: np.ndarray, digits: int) -> str:
    """`mean ± std` over seeds, the one value that there is, or a dash where there is none."""
    if not len(values):
        return "–"
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std(ddof=1):.{digits}f}"


def markdown_table(heading: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def model_names(results: list[dict]) -> list[str]:
    """The teacher first, then other baselines, then the Raptors by their number of blocks."""
    facts = {result["model"]: result for result in results}
    return sorted(
        facts, key=lambda name: (len(facts[name]["phases"] or ()), name != "teacher", name)
    )


def results_table(results: list[dict], published: dict | None = None) -> str:
    """The main table in Markdown, a row a model, `mean ± std` over model seeds.

    Args:
        results: as from `load_results`; columns without any figure are left out.
        published: `evaluation/results/published.json`; its rows follow, marked as published.
    """
    facts = {result["model"]: result for result in results}
    names = model_names(results)
    tasks = [task for task in TASKS if any(result["task"] == task for result in results)]
    if published:
        tasks = [task for task in TASKS if task in tasks or published_value(published, task)]
    r2 = {
        heading: keys
        for heading, keys in R2_COLUMNS.items()
        if any(len(values_of(results, name, "r2", *keys)) for name in names)
    }
    heading = ["model", "phases"]
    for task in tasks:
        heading.append(TASKS[task].heading)
        heading += ["of the teacher's (%)"] if task == "classification" else []
    heading += [*r2, "parameters of the blocks", "of the teacher's layers (%)"]
    teacher = values_of(results, "teacher", "classification", "accuracy").mean()
    layers = facts["teacher"]["block_parameters"]
    rows = []
    for name in names:
        cells = [name, "–" if facts[name]["phases"] is None else str(facts[name]["phases"])]
        for task in tasks:
            shown = TASKS[task]
            values = values_of(results, name, task, shown.metric)
            cells.append(mean_std(shown.scale * values, shown.digits))
            if task == "classification":
                cells.append(f"{100 * values.mean() / teacher:.1f}" if len(values) else "–")
        cells += [mean_std(values_of(results, name, "r2", *keys), 3) for keys in r2.values()]
        parameters = facts[name]["block_parameters"]
        rows.append([*cells, f"{parameters:,}", f"{100 * parameters / layers:.1f}"])
    if published:
        rows += published_rows(published, tasks, len(heading))
    return markdown_table(heading, rows)


def published_value(published: dict, task: str, model: str | None = None) -> dict | None:
    """The published figure of a task, of a model or of the first one that has it."""
    found = (
        row for row in published["results"] if row["task"] == task and model in (None, row["model"])
    )
    return next(found, None)


def published_rows(published: dict, tasks: list[str], width: int) -> list[list[str]]:
    """Rows of the main table for published models, marked as such."""
    rows = []
    teacher = published_value(published, "classification", published["teacher"])["mean"]
    for model in dict.fromkeys(row["model"] for row in published["results"]):
        phases = next(row["phases"] for row in published["results"] if row["model"] == model)
        cells = [f"{model} (published)", "–" if phases is None else str(phases)]
        for task in tasks:
            row, shown = published_value(published, task, model), TASKS[task]
            spread = ""
            if row and row["std"] is not None:
                spread = f" ± {shown.scale * row['std']:.{shown.digits}f}"
            cells.append(f"{shown.scale * row['mean']:.{shown.digits}f}{spread}" if row else "–")
            if task == "classification":
                cells.append(f"{100 * row['mean'] / teacher:.1f}" if row else "–")
        rows.append(cells + ["–"] * (width - len(cells)))
    return rows


def ablation_table(results: list[dict], published: dict | None = None) -> str:
    """What each part of the recipe adds, a row a part, in Markdown.

    Args:
        results: of models that are named by the keys of `ABLATION`.
        published: adds a column with the published accuracies.

    Raises:
        ValueError: rows of the ablation are missing.
    """
    there = {result["model"] for result in results if result["task"] == "classification"}
    missing = [name for name in ABLATION if name not in there]
    if missing:
        raise ValueError(
            f"The ablation lacks results for {', '.join(missing)}: let training/ablate.sh finish."
        )
    heading = ["step", "accuracy (%)", "gain", "R², all tokens", "R², cls"]
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


def ablation_section(folder: str | Path, published: dict | None = None) -> list[str]:
    """The section of the report for a folder of `training/ablate.sh`, as paragraphs."""
    results = load_results(sorted(Path(folder).rglob("results")))
    seeds = sorted({result["seed"] for result in results})
    made_by = ""
    if (Path(folder) / "time.json").exists():
        time = read_json(Path(folder) / "time.json")
        made_by = f"Made by `{time['command']}` in {time['seconds'] / 60:.0f} minutes; "
    return [
        "## Ablation",
        f"{made_by}seeds {seeds}. Every row is the recipe of the row before and one thing more. "
        "Rows 1–5 are judged with the teacher's own linear head as it is; the last row fine-tunes "
        "that head on the same blocks.",
        ablation_table(results, published),
    ]


def pair_section(results: list[dict], pair: tuple[str, str]) -> list[str]:
    """Two models that differ only in how their blocks started (teacher, random)."""
    rows = [
        [name, start]
        + [mean_std(values_of(results, name, "r2", "mean", group), 3) for group in ("all", "cls")]
        for name, start in zip(pair, ("the teacher's layers", "random"), strict=True)
    ]
    return [
        "## Blocks that start from the teacher's layers, against random ones",
        "Same data, same number of steps in both stages, same seeds.",
        markdown_table(["model", "start", "R², all tokens", "R², cls"], rows),
    ]


def draw_figures(
    results: list[dict], names: list[str], output_dir: Path, baseline: str | None
) -> None:
    """`against_k.png` and `r2_per_layer.png` of some Raptors."""
    facts = {result["model"]: result for result in results}
    teacher = values_of(results, "teacher", "classification", "accuracy").mean() / 100
    bars, curves = {}, {}
    for name in names:
        accuracy = values_of(results, name, "classification", "accuracy") / teacher
        label = f"{name}\nk = {len(facts[name]['phases'])}"
        bars[label] = (accuracy, values_of(results, name, "r2", "mean", "all"))
        groups = values_of(results, name, "r2", "layers")[0]
        curves[name] = {
            group: values_of(results, name, "r2", "layers", group).mean(axis=0)
            for group in ("cls", "registers", "patches")
            if group in groups
        }
    line = None
    if baseline:
        share = values_of(results, baseline, "classification", "accuracy") / teacher
        if not len(share):
            raise ValueError(
                f"There is no result for the baseline {baseline!r}; the models are "
                f"{', '.join(model_names(results))}."
            )
        line = (baseline, share.mean())
    plot_bars(bars, output_dir / "against_k.png", baseline=line)
    plot_r2_per_layer(curves, output_dir / "r2_per_layer.png")


def write_report(
    results: list[dict],
    output_dir: str | Path,
    *,
    pair: tuple[str, str] | None = None,
    baseline: str | None = None,
    published: dict | None = None,
    ablation: str | Path | None = None,
) -> str:
    """Write `report.md` and its figures; returns the Markdown of the main table.

    Args:
        pair: two models that differ only in how their blocks started (teacher, random).
        baseline: a smaller model among the results, drawn as a line (the paper's ViT-S).
        published: `evaluation/results/published.json`, shown beside ours and marked.
        ablation: folder of `training/ablate.sh`.
    """
    output_dir, facts = Path(output_dir), results[0]
    table = results_table(results, published)
    raptors = {result["model"] for result in results if result["phases"]}
    names = [name for name in model_names(results) if name in raptors]
    draw_figures(results, [n for n in names if pair is None or n != pair[1]], output_dir, baseline)
    sections = [
        "# Raptor report",
        f"Dataset {facts['dataset']!r}, split {facts['split']!r}, {facts['num_images']} images, "
        f"seeds {sorted({result['seed'] for result in results})}. Accuracy is that of a linear "
        "probe on the frozen backbone, the same for teacher and Raptors; R² is the student's "
        "states against the teacher's on these images, mean over layers 1 … L.",
        table,
    ]
    if published:
        sections.append(
            "Rows marked (published) are the paper's own numbers, for DINOv2 on ImageNet-1k, "
            f"ADE20k and NYUv2: {published['source']['citation']}."
        )
    sections += ["![accuracy and R² against k](against_k.png)", "![R² per layer](r2_per_layer.png)"]
    if (output_dir / "layer_distance.png").exists():
        sections.append("![layer distances](layer_distance.png)")
    sections += pair_section(results, pair) if pair else []
    sections += ablation_section(ablation, published) if ablation else []
    (output_dir / "report.md").write_text("\n\n".join(sections) + "\n")
    return table

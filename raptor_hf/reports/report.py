"""The report: tables and figures of result files, as one Markdown page."""

from pathlib import Path

from ..runs.files import read_json
from .figures import plot_bars, plot_r2_per_layer
from .tables import (
    ABLATION,
    ablation_table,
    load_results,
    markdown_table,
    mean_std,
    model_names,
    probes_table,
    results_table,
    values_of,
)

_FIGURES = {
    "accuracy and R² against k": "against_k.png",
    "R² per layer": "r2_per_layer.png",
    "layer distances": "layer_distance.png",
    "segmentation: image, truth, predictions": "segmentation.png",
    "depth: image, truth, predictions": "depth.png",
}
_FIGURES_OF_TASKS = {
    "classification": "accuracy of a linear probe on the frozen backbone",
    "segmentation": "mean IoU of a linear layer on the patches",
    "depth": "RMSE of a linear layer on patches and cls, in metres",
    "r2": "R² of a student's states against the teacher's, mean over layers 1 … L (the reference "
    "code pools layers, tokens and channels and divides by the spread of the prediction)",
}


def write_report(
    results: list[dict],
    output_dir: str | Path,
    *,
    pair: tuple[str, str] | None = None,
    published: dict | None = None,
    ablation: str | Path | None = None,
) -> str:
    """Write `report.md` and its figures; return the main table in Markdown.

    Args:
        pair: two models that differ only in how their blocks started (teacher, random).
        published: `evaluation/results/published.json`, shown beside ours and marked.
        ablation: folder of `training/ablate.sh`.

    Raises:
        ValueError: results of no Raptor, none of the teacher, or none of a model of the pair.
    """
    # tables
    output_dir = Path(output_dir)
    table = results_table(results, published)
    sections = ["# Raptor report", *_data_section(results), table]
    if published:
        sections.append(
            "Rows marked (published) are for DINOv2 on ImageNet-1k, ADE20k and NYUv2, from "
            f"{published['source']['citation']}. {published['source']['note']}"
        )
    if any("best_on_validation" in result for result in results):
        sections += ["## Probes", probes_table(results)]

    # figures: those that are drawn here, and those that lie in the folder already
    raptors = {result["model"] for result in results if result["phases"]}
    if not raptors:
        raise ValueError("The report is about Raptors; there are only results of other models.")
    names = [name for name in model_names(results) if name in raptors]
    _draw_figures(results, [name for name in names if not pair or name != pair[1]], output_dir)
    for title, name in _FIGURES.items():
        if (output_dir / name).exists():
            sections.append(f"![{title}]({name})")

    # comparisons that were asked for
    if pair:
        sections += _pair_section(results, pair)
    if ablation:
        sections += ablation_section(ablation, published)
    (output_dir / "report.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return table


def _data_section(results: list[dict]) -> list[str]:
    """Return the figure and the images of every task, a line each."""
    lines = []
    for task, figure in _FIGURES_OF_TASKS.items():
        facts = next((result for result in results if result["task"] == task), None)
        if facts:
            images = f"{facts['num_images']} images of {facts['dataset']!r} ({facts['split']})"
            lines.append(f"- {task}: {figure}, on {images}")
    seeds = sorted({result["seed"] for result in results})
    text = (
        f"Seeds {seeds}. Teacher and Raptors go through the same code. `constant` looks at no "
        "image: it answers with the most frequent class, or the mean depth, of the training images."
    )
    return [text, "\n".join(lines)]


def _draw_figures(results: list[dict], names: list[str], output_dir: Path) -> None:
    """Draw `against_k.png` and `r2_per_layer.png` of some Raptors."""
    facts = {result["model"]: result for result in results}
    # a pair of bars and a curve for every model
    teacher = values_of(results, "teacher", "classification", "accuracy")
    bars, curves = {}, {}
    for name in names:
        accuracy = values_of(results, name, "classification", "accuracy")
        shares = 100 * accuracy / teacher.mean() if len(teacher) else teacher
        label = f"{name}\nk = {len(facts[name]['phases'])}"
        bars[label] = (shares, values_of(results, name, "r2", "mean", "all"))
        curve = {}
        for group in ("cls", "registers", "patches"):
            r2 = values_of(results, name, "r2", "layers", group)
            if len(r2):
                curve[group] = r2.mean(axis=0)
        if curve:
            curves[name] = curve
    if len(teacher):
        plot_bars(bars, output_dir / "against_k.png")
    if curves:
        plot_r2_per_layer(curves, output_dir / "r2_per_layer.png")


def _pair_section(results: list[dict], pair: tuple[str, str]) -> list[str]:
    """Compare two models that differ only in how their blocks started (teacher, random)."""
    rows = []
    for name, start in zip(pair, ("the teacher's layers", "random"), strict=True):
        r2 = [values_of(results, name, "r2", "mean", group) for group in ("all", "cls")]
        if not len(r2[0]):
            raise ValueError(f"There is no R² result of {name!r}; check --pair {' '.join(pair)}.")
        rows.append([name, start, *(mean_std(values, 3) for values in r2)])
    return [
        "## Blocks that start from the teacher's layers, against random ones",
        "Same data, same number of steps in both stages, same seeds.",
        markdown_table(["model", "start", "R², all tokens", "R², cls"], rows),
    ]


def ablation_section(folder: str | Path, published: dict | None = None) -> list[str]:
    """Return the section of the report for a folder of `training/ablate.sh`, as paragraphs."""
    # the teacher is judged beside the tuned head too
    folders = sorted(Path(folder).rglob("results"))
    results = []
    for results_folder in folders:
        results += [r for r in load_results([results_folder]) if r["model"] in ABLATION]
    seeds = sorted({result["seed"] for result in results})
    made_by = ""
    if (Path(folder) / "time.json").exists():
        time = read_json(Path(folder) / "time.json")
        made_by = f"Made by `{time['command']}` in {time['seconds'] / 60:.0f} minutes; "
    return [
        "## Ablation",
        f"{made_by}seeds {seeds}. Every row is the recipe of the row before and one thing more: "
        "blocks that learn each layer from the teacher's own states; from their own states within "
        "a phase; told the layer that they make; the cls token as heavy as all patches in the last "
        "block's loss; all blocks trained end to end. These rows are judged with the teacher's own "
        "linear head as it is; the last row fine-tunes that head on the same blocks.",
        ablation_table(results, published),
    ]

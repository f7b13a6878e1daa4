"""The report: tables and figures of result files, as one Markdown page."""

from collections.abc import Sequence
from pathlib import Path

from .figures import plot_r2_per_layer
from .tables import (
    ABLATION,
    COLUMNS,
    ablation_table,
    load_results,
    model_names,
    results_table,
    values_of,
)

_INTRODUCTION = (
    "Linear probes of frozen backbones, teacher and Raptors alike, and R² of a Raptor's states "
    "against the teacher's, mean over layers 1 … L. `constant` looks at no image: it answers with "
    "the most frequent class, or the mean depth, of the training images."
)


def write_report(
    results: list[dict], output_dir: str | Path, *, ablation: Sequence[str] = ()
) -> str:
    """Write `report.md` and its figures; return the main table in Markdown.

    Pictures (PNG) that lie in the folder are shown in it.

    Args:
        ablation: paragraphs of `ablation_section`.

    Raises:
        ValueError: results of no Raptor, or none of the teacher.
    """
    # the images of every task, and the main table
    output_dir, images = Path(output_dir), []
    facts = {result["task"]: result for result in results}
    for task in facts.keys() & {*COLUMNS, "r2"}:
        about = facts[task]
        name, split = about["dataset"], about["split"]
        images.append(f"- {task}: {about['num_images']} images of {name!r} ({split})")
    seeds = sorted({result["seed"] for result in results})
    table = results_table(results)
    sections = [
        f"# Raptor report\n\n{_INTRODUCTION} Seeds {seeds}.",
        "\n".join(sorted(images)),
        table,
    ]

    # R² per layer, and the pictures of the folder
    if not any(result["phases"] for result in results):
        raise ValueError("The report is about Raptors; there are only results of other models.")
    curves: dict[str, dict] = {}
    for group in ("cls", "registers", "patches"):
        for name in model_names(results):
            r2 = values_of(results, name, "r2", "layers", group)
            if len(r2):
                curves.setdefault(group, {})[name] = r2.mean(axis=0)
    if curves:
        plot_r2_per_layer(curves, output_dir / "r2_per_layer.png")
    for figure in sorted(output_dir.glob("*.png")):
        sections.append(f"![{figure.stem.replace('_', ' ')}]({figure.name})")
    page = "\n\n".join([*sections, *ablation])
    (output_dir / "report.md").write_text(page + "\n", encoding="utf-8")
    return table


def ablation_section(folder: str | Path, published: dict) -> list[str]:
    """Return the section of the report for a folder of `training/ablate.sh`, as paragraphs.

    Args:
        published: `evaluation/results/published.json`, whose accuracies stand beside.
    """
    # the teacher is judged beside the tuned head too
    results = []
    for results_folder in sorted(Path(folder).rglob("results")):
        for result in load_results([results_folder]):
            if result["model"] in ABLATION:
                results.append(result)
    seeds, source = sorted({result["seed"] for result in results}), published["source"]
    return [
        "## Ablation",
        f"Seeds {seeds}. Every row is the recipe of the row before and one thing more: "
        "blocks that learn each layer from the teacher's own states; from their own states within "
        "a phase; told the layer that they make; the cls token as heavy as all patches in the last "
        "block's loss; all blocks trained end to end. These rows are judged with the teacher's own "
        "linear head as it is; the last row fine-tunes that head on the same blocks. Published: "
        f"DINOv2 on ImageNet-1k, from {source['citation']}.",
        ablation_table(results, published),
    ]

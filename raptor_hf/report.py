"""Tables and figures, made from result files alone."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from .runs import read_json  # noqa: E402


def plot_layer_distance(
    distance: np.ndarray, phases: dict[str, list[int]], path: str | Path
) -> None:
    """The (L, L) distance matrix as a picture, with the cuts of every partition drawn in."""
    layers = len(distance)
    figure, axes = plt.subplots(figsize=(6.4, 5.4), layout="constrained")
    image = axes.imshow(distance, cmap="viridis", extent=(0.5, layers + 0.5, layers + 0.5, 0.5))
    for number, (k, lengths) in enumerate(phases.items()):
        color, start = f"C{number + 1}", 0.5
        for p, length in enumerate(lengths):
            square = plt.Rectangle(
                (start, start), length, length, fill=False, color=color, lw=4.5 - 1.2 * number,
                label=f"k = {k}: {lengths}" if p == 0 else None,
            )  # fmt: skip
            axes.add_patch(square)
            start += length
    axes.set(xlabel="layer", ylabel="layer", title="Cosine distance between layers, and the phases")
    axes.set_xticks(range(1, layers + 1))
    axes.set_yticks(range(1, layers + 1))
    figure.colorbar(image, label="mean of 1 − cosine")
    axes.legend(loc="upper right", fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


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
    """One figure of a model over its seeds: (seeds,), or (seeds, L) for figures per layer."""
    found = []
    for result in sorted(results, key=lambda result: result["seed"]):
        if (result["model"], result["task"]) == (model, task):
            value = result["metrics"]
            for key in keys:
                value = value[key]
            found.append(value)
    return np.array(found)


def mean_std(values: np.ndarray, digits: int) -> str:
    """`mean ± std` over seeds, or the one value that there is."""
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std(ddof=1):.{digits}f}"


def model_names(results: list[dict]) -> list[str]:
    """The teacher first, then the Raptors by their number of blocks."""
    facts = {result["model"]: result for result in results}
    return sorted(facts, key=lambda name: (len(facts[name]["phases"] or ()), name))


def results_table(results: list[dict]) -> str:
    """The main table in Markdown: accuracy, share of the teacher's, R², parameters."""
    facts = {result["model"]: result for result in results}
    teacher = values_of(results, "teacher", "classification", "accuracy")
    lines = [
        "| model | phases | accuracy (%) | of the teacher's (%) | R², all tokens | R², cls "
        "| R², patches | parameters of the blocks | of the teacher's layers (%) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in model_names(results):
        accuracy = values_of(results, name, "classification", "accuracy")
        r2 = [
            mean_std(values, 3) if len(values) else "–"
            for values in (
                values_of(results, name, "r2", "mean", group) for group in ("all", "cls", "patches")
            )
        ]
        cells = [
            name,
            "–" if facts[name]["phases"] is None else str(facts[name]["phases"]),
            mean_std(100 * accuracy, 1),
            f"{100 * accuracy.mean() / teacher.mean():.1f}",
            *r2,
            f"{facts[name]['block_parameters']:,}",
            f"{100 * facts[name]['block_parameters'] / facts['teacher']['block_parameters']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_against_k(results: list[dict], names: list[str], path: str | Path) -> None:
    """Accuracy (% of the teacher's) and mean R² against the number of blocks."""
    facts = {result["model"]: result for result in results}
    k = [len(facts[name]["phases"]) for name in names]
    teacher = values_of(results, "teacher", "classification", "accuracy").mean()
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.6), layout="constrained")
    for name, x in zip(names, k, strict=True):
        accuracy = 100 * values_of(results, name, "classification", "accuracy") / teacher
        left.plot([x] * len(accuracy), accuracy, "o", color="C0", alpha=0.5)
        for color, group in enumerate(("all", "cls", "patches")):
            r2 = values_of(results, name, "r2", "mean", group)
            right.plot(
                [x] * len(r2), r2, "o", color=f"C{color}", label=group if name == names[0] else None
            )
    left.axhline(100, color="grey", ls="--", lw=1)
    left.set(xlabel="blocks k", ylabel="accuracy, % of the teacher's", xticks=k)
    right.set(xlabel="blocks k", ylabel="R², mean over layers", xticks=k)
    right.legend(fontsize="small", title="tokens")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_r2_per_layer(results: list[dict], names: list[str], path: str | Path) -> None:
    """R² of every layer, one panel a token group, one line a model (mean over seeds)."""
    measured = values_of(results, names[0], "r2", "layers")[0]
    groups = [group for group in ("cls", "registers", "patches") if group in measured]
    figure, panels = plt.subplots(
        1, len(groups), figsize=(3.6 * len(groups), 3.4), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes, group in zip(panels[0], groups, strict=True):
        for name in names:
            r2 = values_of(results, name, "r2", "layers", group).mean(axis=0)
            axes.plot(range(1, len(r2) + 1), r2, ".-", label=name)
        axes.set(xlabel="layer", title=group)
    panels[0][0].set_ylabel("R² on held-out images")
    panels[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_report(
    results: list[dict], output_dir: str | Path, *, pair: tuple[str, str] | None = None
) -> str:
    """Write `report.md` and its figures; returns the Markdown of the main table.

    Args:
        pair: two models that differ only in how their blocks started (teacher, random).
    """
    output_dir = Path(output_dir)
    table = results_table(results)
    names = [name for name in model_names(results) if name != "teacher"]
    main = [name for name in names if pair is None or name != pair[1]]
    plot_against_k(results, main, output_dir / "against_k.png")
    plot_r2_per_layer(results, main, output_dir / "r2_per_layer.png")
    facts = results[0]
    seeds = sorted({result["seed"] for result in results})
    sections = [
        "# Raptor report",
        f"Dataset {facts['dataset']!r}, split {facts['split']!r}, {facts['num_images']} images, "
        f"seeds {seeds}. Accuracy is that of a linear probe on the frozen backbone, the same for "
        "teacher and Raptors; R² is the student's states against the teacher's on these "
        "images, mean over layers 1 … L.",
        table,
        "![accuracy and R² against k](against_k.png)",
        "![R² per layer](r2_per_layer.png)",
    ]
    if (output_dir / "layer_distance.png").exists():
        sections.append("![layer distances](layer_distance.png)")
    if pair:
        rows = [
            f"| {name} | {start} | {mean_std(values_of(results, name, 'r2', 'mean', 'all'), 3)} "
            f"| {mean_std(values_of(results, name, 'r2', 'mean', 'cls'), 3)} |"
            for name, start in zip(pair, ("the teacher's layers", "random"), strict=True)
        ]
        sections += [
            "## Blocks that start from the teacher's layers, against random ones",
            "Same data, same number of steps in both stages, same seeds.",
            "\n".join(["| model | start | R², all tokens | R², cls |", "|---|---|---|---|", *rows]),
        ]
    (output_dir / "report.md").write_text("\n\n".join(sections) + "\n")
    return table

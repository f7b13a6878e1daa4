"""Figures of the benchmarks: results in, a picture out."""

from pathlib import Path

import numpy as np

from raptor_hf.plotting import make_figure

from .recipes import recipes  # noqa: E402


def plot_ratios(result: dict[str, dict[str, float]], path: str | Path) -> None:
    """Draw a panel a measurement, a bar a candidate; only rows of ratios, which lie around 1;
    without any, nothing.
    """
    rows = {
        name: row
        for name, row in result.items()
        if name.startswith(("inference", "training step", "reading", "writing"))
        and ": " not in name
    }
    if not rows:
        return
    height = sum(0.4 + 0.28 * len(row) for row in rows.values()) + 0.4
    figure, panels = make_figure(
        len(rows), 1, figsize=(6.4, height), squeeze=False, layout="constrained",
        height_ratios=[1 + len(row) for row in rows.values()],
    )  # fmt: skip
    for axes, (name, row) in zip(panels[:, 0], rows.items(), strict=True):
        bars = axes.barh(list(row), list(row.values()), color="C0")
        axes.bar_label(bars, fmt=" %.2f", fontsize="small")
        axes.axvline(1, color="black", lw=0.8)
        axes.invert_yaxis()
        axes.set_title(name, fontsize="small", loc="left")
        axes.set_xlim(0, 1.15 * max([1, *row.values()]))
        axes.tick_params(labelsize="small")
    figure.savefig(path, dpi=130)


def plot_recipes(result: dict, path: str | Path) -> None:
    """Draw R² against compute, a panel a k, a line a recipe: the tuned rates; dots are all others.

    Both axes are logarithmic, R² as what is missing to 1; error bars are one standard deviation of
    the seeds.

    Args:
        result: `runs` and `table` of `recipe_benchmark.benchmark_recipes`.
    """
    ks = sorted({row["k"] for row in result["table"]})
    names = [name for name in recipes() if any(r["recipe"] == name for r in result["table"])]
    figure, panels = make_figure(
        1, len(ks), figsize=(4.2 * len(ks), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, k in zip(panels[0], ks, strict=True):
        for number, name in enumerate(names):
            rows = [row for row in result["table"] if (row["recipe"], row["k"]) == (name, k)]
            if not rows:
                continue
            budgets = [row["budget"] for row in rows]
            missing = [1 - np.array(row["r2"]) for row in rows]
            color = f"C{number}"
            axes.errorbar(
                budgets, [m.mean() for m in missing], [m.std() for m in missing],
                fmt=".-", color=color, capsize=3, label=name,
            )  # fmt: skip
            runs = [run for run in result["runs"] if (run["recipe"], run["k"]) == (name, k)]
            axes.plot(
                [run["budget"] for run in runs], [1 - run["r2"]["all"] for run in runs],
                ".", color=color, ms=3, alpha=0.4,
            )  # fmt: skip
        axes.set(
            xscale="log", yscale="log", xlabel="compute (steps of 64 images)", title=f"k = {k}"
        )
        axes.grid(alpha=0.3, which="both")
        ticks = sorted({row["budget"] for row in result["table"]})
        axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
        axes.minorticks_off()
    means = [1 - np.mean(row["r2"]) for row in result["table"]]
    worst, best = 1.2 * max(means), min(means) / 1.2
    ticks = [4, 2, 1, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01, 0.005]
    panels[0][0].set_yticks(ticks, [f"{1 - tick:g}" for tick in ticks])
    panels[0][0].set_ylim(worst, best)  # better is higher
    panels[0][0].minorticks_off()
    panels[0][0].set_ylabel("R² of all tokens, test images")
    panels[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=130)

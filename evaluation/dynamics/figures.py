"""Pictures of a study of depth as time: results in, figures out; see `dynamics_study`."""

from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure

from raptor_hf.configuration_raptor import phase_spans
from raptor_hf.dynamics.interventions import SWAPS

from .study import partition_name

_GROUPS = {"cls": "#d2550f", "registers": "#6a51a3", "patches": "#1f6fb4"}
_MODELS = ["#222222", "#1f6fb4", "#d2550f", "#2a8f5a", "#8c564b", "#6a51a3"]
_MARKERS = "os^Dvx"
_PHASES = ["#1f6fb4", "#d2550f", "#2a8f5a", "#6a51a3", "#8c564b", "#c2185b"]


def _panels(rows: int, columns: int, **options) -> tuple[Figure, np.ndarray]:
    """Return a figure and its axes, (rows, columns); without pyplot, which keeps every figure."""
    figure = Figure(figsize=(3.4 * columns + 0.6, 2.7 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def line(axis, x, found: dict, number: int, label: str | None, *, band: bool = False) -> None:
    """Draw a mean over images as a model's line, with its standard deviation as a band."""
    mean, std = np.array(found["mean"], dtype=float), np.array(found["std"], dtype=float)
    color, marker = _MODELS[number % len(_MODELS)], _MARKERS[number % len(_MARKERS)]
    axis.plot(x, mean, marker + "-", ms=3, lw=1.2, color=color, label=label)
    if band:
        axis.fill_between(x, mean - std, mean + std, color=color, alpha=0.12, lw=0)


def _shown_phases(result: dict) -> list[int] | None:
    """Return the partition that is drawn for a model: a Raptor's own, or the middle one."""
    partitions = result["partitions"]
    return partitions[len(partitions) // 2] if partitions else None


def _plot_convergence(results: list[dict]) -> Figure:
    """Draw the γ and norms over the layers, a column a token group, a line a model."""
    groups = list(results[0]["convergence"])
    figure, axes = _panels(2, len(groups), sharex=True)
    for column, group in enumerate(groups):
        for number, result in enumerate(results):
            x = range(result["depth"] + 1)
            for row, name in enumerate(("convergence", "norm")):
                label = result["model"]
                line(axes[row, column], x, result[name][group], number, label, band=number == 0)
        axes[0, column].set(title=group, ylim=(None, 1.02))
        axes[1, column].set(xlabel="layer")
    axes[0, 0].set_ylabel("γ: cosine to the last state")
    axes[1, 0].set_ylabel("norm")
    axes[0, 0].legend(fontsize="x-small")
    return figure


def _plot_speed(results: list[dict]) -> Figure:
    """Draw the angular speed over the layers, a panel a model, with its phase boundaries."""
    figure, axes = _panels(1, len(results), sharey=True)
    for axis, result in zip(axes[0], results, strict=True):
        for group, figures in result["speed"].items():
            x, mean, std = (
                np.arange(1, result["depth"] + 1),
                *(np.array(figures[n]) for n in ("mean", "std")),
            )
            axis.plot(x, mean, "o-", ms=3, lw=1.2, color=_GROUPS[group], label=group)
            axis.fill_between(x, mean - std, mean + std, color=_GROUPS[group], alpha=0.15, lw=0)
        phases = _shown_phases(result) or []
        for _, stop in phase_spans(phases)[:-1]:  # the turn into a phase is its first layer's
            axis.axvline(stop + 1, color="#666666", ls="--", lw=1)
        axis.set(xlabel="layer", title=result["model"] + (f" {phases}" if phases else ""))
    axes[0, 0].set_ylabel("turn of the layer (degrees)")
    axes[0, 0].legend(fontsize="x-small")
    return figure


def _plot_class_basins(results: list[dict]) -> Figure:
    """Draw the angles to class means over the layers, and paths of cls tokens, a column a model."""
    figure, axes = _panels(2, len(results))
    for (above, below), result in zip(axes.T, results, strict=True):
        basins, x = result["class_basins"], range(result["depth"] + 1)
        line(above, x, basins["own_angle"], 1, "own class", band=True)
        line(above, x, basins["other_angle"], 2, "nearest other", band=True)
        above.set(title=result["model"], xlabel="layer")
        paths, labels = np.array(basins["trajectories"]), np.array(basins["labels"])
        for number, label in enumerate(np.unique(labels)):
            path, color = paths[labels == label], f"C{number}"
            below.plot(*path.transpose(2, 1, 0), lw=0.6, alpha=0.5, color=color)
            below.plot(*path[:, -1].T, "o", ms=3, color=color, label=f"class {label}")
        below.set(xlabel="first component", aspect="equal")
    axes[0, 0].set_ylabel("angle to class mean (degrees)")
    axes[0, 0].legend(fontsize="x-small")
    axes[1, 0].set_ylabel("second component")
    axes[1, -1].legend(fontsize="xx-small", loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def _plot_self_correction(results: list[dict]) -> Figure:
    """Draw what is left of a push over the layers: a row a token group, a column a model."""
    groups = list(dict.fromkeys(g for r in results for g in r["self_correction"]))
    figure, axes = _panels(len(groups), len(results), sharex=True, sharey="row")
    for row, group in enumerate(groups):
        for axis, result in zip(axes[row], results, strict=True):
            pushes = result["self_correction"].get(group, {})
            for style, (epsilon, by_layer) in zip(
                ("-", "--", ":") * 9, pushes.items(), strict=False
            ):
                for number, (layer, angles) in enumerate(by_layer.items()):
                    left = np.array(angles["mean"]) / angles["mean"][0]
                    label = f"ε = {epsilon}" if number == 0 else None
                    x = int(layer) + np.arange(len(left))
                    axis.plot(x, left, style, lw=1.2, color=_MODELS[number % 6], label=label)
            axis.axhline(1, color="#666666", lw=0.8)
            axis.set(title=f"{result['model']}, {group}")
        axes[row, 0].set_ylabel("angle, share of the pushed one")
        axes[row, 0].set_ylim(bottom=0)
    for axis in axes[-1]:
        axis.set_xlabel("layer")
    axes[0, 0].legend(fontsize="x-small")
    return figure


def _plot_rank_and_coherence(results: list[dict]) -> Figure:
    """Draw the ranks of updates, and coherence of patches and of their updates, a line a model."""
    kinds = [
        ("update_rank", "stable", "stable rank of updates"),
        ("update_rank", "effective", "effective rank of updates"),
        ("coherence", "states", "κ of patches"),
        ("coherence", "updates", "κ of their updates"),
    ]
    figure, axes = _panels(1, 4)
    for axis, (name, kind, title) in zip(axes[0], kinds, strict=True):
        for number, result in enumerate(results):
            values = result[name][kind]
            x = range(result["depth"] + 1 - len(values["mean"]), result["depth"] + 1)
            line(axis, x, values, number, result["model"], band=number == 0)
        axis.set(title=title, xlabel="layer")
    axes[0, 0].legend(fontsize="x-small")
    return figure


def _plot_layer_swap(results: list[dict]) -> Figure:
    """Draw accuracy (or cosine to the untouched state) after swaps: a panel a partition, dots
    draws.
    """
    result = next(result for result in results if "layer_swap" in result)
    swaps = result["layer_swap"]
    partitions = [name for name in map(partition_name, result["partitions"]) if name in swaps]
    figure, axes = _panels(1, len(partitions), sharey=True)
    for axis, partition in zip(axes[0], partitions, strict=True):
        for number, kind in enumerate(SWAPS):
            for replaced, figures in swaps[partition].get(kind, {}).items():
                measured = "accuracy" if "accuracy" in figures else "cosine"
                values, x = np.array(figures[measured]["mean"]), int(replaced) + 0.22 * (number - 1)
                first = replaced == next(iter(swaps[partition][kind]))
                label = kind.replace("_", " ") if first else None
                axis.plot(np.full(len(values), x), values, ".", ms=4, alpha=0.4, color=f"C{number}")
                axis.plot(
                    [x - 0.09, x + 0.09], [values.mean()] * 2, lw=3, color=f"C{number}", label=label
                )
        untouched = swaps["untouched"]["accuracy"]["mean"] if measured == "accuracy" else 1.0
        axis.axhline(untouched, color="#222222", lw=1, ls="--", label="untouched")
        axis.set(title=f"{result['model']} {partition}", xlabel="layers replaced", xticks=[1, 2, 3])
    axes[0, 0].set_ylabel(measured)
    axes[0, 0].legend(fontsize="x-small")
    return figure


def _plot_phase_contrast(results: list[dict]) -> Figure:
    """Draw the contrast of phases, as lines, among those of random partitions, as dots."""
    columns = [
        (r["model"], p, contrast) for r in results for p, contrast in r["phase_contrast"].items()
    ]
    figure, axes = _panels(1, 1)
    figure.set_size_inches(1.5 * len(columns) + 1.5, 3.4)
    for x, (_, _, contrast) in enumerate(columns):
        for shift, (kind, color) in enumerate({"random": "C0", "shuffled": "C1"}.items()):
            values = np.array([c for c in contrast[kind] if c is not None], dtype=float)
            label = f"{kind} {'runs' if kind == 'random' else 'layers'}" if x == 0 else None
            at = x + 0.25 * (shift - 0.5) + np.linspace(-0.08, 0.08, len(values))
            axes[0, 0].plot(at, values, ".", ms=3, alpha=0.5, color=color, label=label)
        if contrast["contrast"] is not None:
            mark = {"label": "these phases"} if x == 0 else {}
            axes[0, 0].plot(
                [x - 0.3, x + 0.3], [contrast["contrast"]] * 2, color="#222222", lw=2, **mark
            )
    axes[0, 0].set_xticks(range(len(columns)), [f"{model}\n{p}" for model, p, _ in columns])
    axes[0, 0].set_ylabel("contrast of distances")
    axes[0, 0].legend(fontsize="x-small")
    return figure


def _plot_more_time(results: list[dict]) -> Figure:
    """Draw what further applications of the last block do, solid with the depth held, dashed
    free.
    """
    results = [result for result in results if "more_time" in result]
    accuracies = all("accuracy" in r["more_time"]["held"] for r in results)
    figure, axes = _panels(1, 3 if accuracies else 2)
    for number, result in enumerate(results):
        for depth_mode, style in (("held", "-"), ("free", "--")):
            figures, color = result["more_time"][depth_mode], _MODELS[(number + 1) % 6]
            label = f"{result['model']}, {depth_mode}"
            for axis, name in zip(axes[0], ("convergence", "speed", "accuracy"), strict=False):
                curve = figures[name] if name == "accuracy" else figures[name]["patches"]
                y, first = np.array(curve["mean"], dtype=float), int(name == "speed")
                axis.plot(range(first, first + len(y)), y, style, lw=1.2, color=color, label=label)
    titles = ("patches: cosine to x_L", "patches: turn (degrees)", "accuracy")
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set(title=title, xlabel="further applications m")
    axes[0, 0].legend(fontsize="x-small")
    return figure


def _plot_linear_modes(results: list[dict]) -> Figure:
    """Draw each phase's linear map, a column a model, two rows a token group.

    Eigenvalues beside the unit circle, and how well it predicts (dashed: standing still).
    """
    groups = list(results[0]["linear_modes"])
    figure, axes = _panels(2 * len(groups), len(results))
    circle = np.linspace(0, 2 * np.pi, 200)
    for number, group in enumerate(groups):
        for above, below, result in zip(*axes[2 * number : 2 * number + 2], results, strict=True):
            above.plot(np.cos(circle), np.sin(circle), color="#999999", lw=0.8)
            for phase, (start, stop) in enumerate(phase_spans(_shown_phases(result))):
                modes = result["linear_modes"][group][f"{start + 1}-{stop}"]
                color, steps = _PHASES[phase % len(_PHASES)], range(1, stop - start + 1)
                label = f"layers {start + 1}–{stop}"
                above.plot(*np.array(modes["eigenvalues"]).T, "o", ms=3, color=color, label=label)
                below.plot(steps, modes["map"], "o-", ms=3, lw=1.2, color=color, label=label)
                below.plot(steps, modes["identity"], "--", lw=1.2, color=color)
            above.set(aspect="equal", title=f"{result['model']}, {group}")
            below.set(xlabel="layers ahead")
            above.legend(fontsize="xx-small")
        axes[2 * number, 0].set_ylabel("imaginary part")
        axes[2 * number + 1, 0].set_ylabel("cosine to the state")
    return figure


def draw_study(results: list[dict]) -> Iterator[tuple[str, Figure]]:
    """Yield all figures that there are results for, by name.

    Args:
        results: of `dynamics_study.study_models`.
    """
    plots = {
        "convergence": _plot_convergence,
        "speed": _plot_speed,
        "class_basins": _plot_class_basins,
        "self_correction": _plot_self_correction,
        "rank_and_coherence": _plot_rank_and_coherence,
        "layer_swap": _plot_layer_swap,
        "phase_contrast": _plot_phase_contrast,
        "more_time": _plot_more_time,
        "linear_modes": _plot_linear_modes,
    }
    for name, plot in plots.items():
        always = name in ("convergence", "speed", "rank_and_coherence")
        having = [result for result in results if always or name in result]
        if having:
            yield name, plot(having)

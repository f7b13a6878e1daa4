"""Claims about depth as time, each decided by the figures of one model.

The results are those of `study.ModelStudy.result`.
"""

from collections.abc import Callable

import numpy as np

from evaluation.claims import Claim, Verdict, all_of, by_interval

from .study import SWAPPED, partition_name

_CLEARLY = 0.95  # share of random partitions that a partition must beat
_PAPER, _OURS = "arXiv 2512.19941", "a question of ours"


def _mean_of(figures: dict, *keys: str) -> np.ndarray:
    """Return the mean over images of a figure, by its keys."""
    for key in keys:
        figures = figures[key]
    return np.array(figures["mean"])


def _corrects(group: str) -> Callable[[dict], Verdict | None]:
    """Decide whether a push loses length, which growing norms alone do not bring about.

    A push that keeps its length leaves the share ‖x_ℓ‖ / ‖x_L‖ of a small angle; in length a push
    grows by the quotient of both shares.
    """

    def decide(result: dict) -> Verdict | None:
        pushes = result.get("self_correction", {}).get(group)
        if not pushes:
            return None
        epsilon = min(pushes, key=float)
        norms, left, alone = _mean_of(result, "norm", group), [], []
        for layer, angles in pushes[epsilon].items():
            left.append(angles["mean"][-1] / angles["mean"][0])
            alone.append(norms[int(layer)] / norms[-1])
        growth = np.array(left) / np.array(alone)
        lines = []
        for values in (left, alone):
            lines.append(", ".join(f"{100 * share:.0f} %" for share in values))
        text = (
            f"of a push of {epsilon} after layer {', '.join(pushes[epsilon])} is left at the end: "
            f"{lines[0]} of the angle; norms alone leave {lines[1]}; "
            f"in length it grows × {', '.join(f'{factor:.2f}' for factor in growth)}"
        )
        return Verdict(max(growth) < 1, text)

    return decide


def _late_cls(result: dict) -> Verdict | None:
    """Decide whether the cls token turns most in the last quarter."""
    if "cls" not in result["speed"]:
        return None
    speed = _mean_of(result, "speed", "cls")
    fastest = int(speed[1:].argmax()) + 2
    return Verdict(
        fastest > 0.75 * len(speed),
        f"the largest turn after layer 1 is at layer {fastest} of {len(speed)}: "
        f"{speed[fastest - 1]:.0f}°; the last layer's: {speed[-1]:.0f}°",
    )


def _ordered_speeds(result: dict) -> Verdict | None:
    """Decide whether registers are slower than patches, and patches than cls."""
    if len(result["speed"]) < 3:
        return None
    speeds = {group: _mean_of(result, "speed", group)[1:].mean() for group in result["speed"]}
    text = ", ".join(f"{group} {speed:.0f}°" for group, speed in speeds.items())
    return Verdict(speeds["registers"] < speeds["patches"] < speeds["cls"], text)


def _piecewise(result: dict) -> Verdict | None:
    """Decide whether speeds jump at the boundaries of phases."""
    clear, texts = [], []
    for group, speed in result["speed"].items():
        for partition, at in speed["at_boundaries"].items():
            if at is None:
                continue
            clear.append(at["ratio"] > 1 and at["above_random"] >= _CLEARLY)
            beats = f"beats {100 * at['above_random']:.0f} %"
            texts.append(f"{group} {partition}: {at['ratio']:.2f} ({beats})")
    if not clear:
        return None
    text = f"clear in {sum(clear)} of {len(clear)} cases; {', '.join(texts)}"
    return Verdict(sum(clear) > len(clear) / 2, text)


def _swaps_differ(result: dict) -> Verdict | None:
    """Decide whether layers of the same phase stand in for each other better than near others."""
    texts, answers = [], []
    for partition in map(partition_name, result["partitions"]):
        kinds = result.get("layer_swap", {}).get(partition, {})
        both = [
            kinds.get(kind, {}).get(str(SWAPPED)) for kind in ("same_phase", "other_phase_near")
        ]
        if None in both:
            continue
        # over the draws, by the accuracy where there is a head
        figure = "accuracy" if "accuracy" in both[0] else "cosine"
        same, across = (np.array(swaps[figure]["mean"]) for swaps in both)
        error = np.sqrt(same.var(ddof=1) / len(same) + across.var(ddof=1) / len(across))
        gain = same.mean() - across.mean()
        answers.append(by_interval(gain - 2 * error, gain + 2 * error))
        means = f"{same.mean():.3f} against {across.mean():.3f}"
        texts.append(f"{partition}: {means} (± {error:.3f})")
    if not texts:
        return None
    text = f"{figure} with {SWAPPED} layers swapped, {'; '.join(texts)}"
    return Verdict(all_of(answers), text)


def _contrast(result: dict) -> Verdict | None:
    """Decide whether phases are tighter than random runs and than shuffled layers."""
    least, texts = [], []
    for partition, figures in result.get("phase_contrast", {}).items():
        contrast = figures["contrast"]
        if contrast is None or not figures["random"]:
            continue
        beaten = {}
        for kind in ("random", "shuffled"):
            beaten[kind] = np.mean([c is None or contrast > c for c in figures[kind]])
        least.append(min(beaten.values()))
        texts.append(
            f"{partition}: {contrast:.2f}, beats {100 * beaten['random']:.0f} % of random runs, "
            f"{100 * beaten['shuffled']:.0f} % of shuffled layers"
        )
    return Verdict(min(least) >= _CLEARLY, "; ".join(texts)) if texts else None


def _settles(result: dict) -> Verdict | None:
    """Decide whether the state comes to rest when the last block goes on."""
    held = result.get("more_time", {}).get("held")
    if not held:
        return None
    speed, cosine = (_mean_of(held, name, "patches") for name in ("speed", "convergence"))
    text = (
        f"patches turn {speed[0]:.1f}° → {speed[-1]:.1f}° an application (m = 1, {len(speed)}), "
        f"cosine to x_L {cosine[-1]:.2f}"
    )
    if "accuracy" in held:
        accuracy = _mean_of(held, "accuracy")
        text += f"; accuracy {accuracy[0]:.3f} → {accuracy[-1]:.3f}"
    return Verdict(speed[-1] < 0.1 * speed[0], text)


CLAIMS = [
    Claim("Layers correct a pushed cls token", _PAPER,
          "a push loses length, after every layer, at the smallest ε", _corrects("cls")),
    Claim("Layers correct pushed patches", _PAPER, "the same for patches", _corrects("patches")),
    Claim("cls turns sharply late", _PAPER,
          "its largest turn, the first apart, is in the last quarter", _late_cls),
    Claim("Registers are slow, patches between, cls fast", _PAPER,
          "order of the mean turns after layer 1", _ordered_speeds),
    Claim("Speed jumps where phases meet", _PAPER,
          "ratio above 1 and above that of 95 % of random cuts, in most cases", _piecewise),
    Claim("Layers of one phase stand in for each other", _PAPER,
          "better than layers of another phase that are no farther away than a phase is long, by "
          "two standard errors over the draws", _swaps_differ),
    Claim("Phases are tighter than random ones", _PAPER,
          "contrast above that of 95 % of random and of shuffled partitions", _contrast),
    Claim("With more time the state settles", _OURS,
          "the last block's last extra turn of the patches is below a tenth of its first, "
          "depth held at L", _settles),
]  # fmt: skip

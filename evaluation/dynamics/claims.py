"""Claims about depth as time, each decided by the figures of one model.

The results are those of `study.ModelStudy.result`.
"""

from collections.abc import Callable, Sequence

import numpy as np

from evaluation.claims import Claim, Verdict, by_interval

from .study import SWAPPED, partition_name

_CLEARLY = 0.95  # share of random partitions that a partition must beat
_PAPER, _OURS = "arXiv 2512.19941", "a question of ours"


def _mean_of(figures: dict, *keys: str) -> np.ndarray:
    """Return the mean over images of a figure, by its keys."""
    for key in keys:
        figures = figures[key]
    return np.array(figures["mean"])


def _arrows(values: np.ndarray) -> str:
    """Return the first, middle and last value of a curve as text."""
    return " → ".join(f"{values[n]:.2f}" for n in (0, len(values) // 2, -1))


def _converges(result: dict) -> Verdict:
    """Decide whether directions approach the last one layer by layer."""
    seen, texts = True, []
    for group in result["convergence"]:
        curve = _mean_of(result, "convergence", group)
        seen &= (np.diff(curve) > 0).mean() >= 0.9
        texts.append(f"{group} {_arrows(curve)}")
    return Verdict(seen, "; ".join(texts))


def _s_shaped(result: dict) -> Verdict:
    """Decide whether the rise is slow, then fast, then slow."""
    seen, steepest = True, []
    for group in result["convergence"]:
        rises = np.diff(_mean_of(result, "convergence", group))
        layer, quarter = int(rises.argmax()) + 1, len(rises) / 4
        seen &= quarter < layer <= 3 * quarter
        steepest.append(f"{group} at layer {layer}")
    return Verdict(seen, f"steepest: {', '.join(steepest)} of {result['depth']}")


def _basins(result: dict) -> Verdict | None:
    """Decide whether classes gather."""
    if "class_basins" not in result:
        return None
    silhouette = _mean_of(result, "class_basins", "silhouette")
    own = _mean_of(result, "class_basins", "own_angle")[-1]
    other = _mean_of(result, "class_basins", "other_angle")[-1]
    return Verdict(
        silhouette[-1] > max(0, silhouette[1]),
        f"silhouette {silhouette[1]:.2f} → {silhouette[-1]:.2f} (layers 1, {result['depth']}); at "
        f"the end {own:.0f}° to the own class, {other:.0f}° to the nearest other",
    )


def _corrects(group: str) -> Callable[[dict], Verdict | None]:
    """Decide whether the angle of a push shrinks, and beside it what growing norms alone do.

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
        text = (
            f"of a push of {epsilon} after layer {', '.join(pushes[epsilon])} is left at the end: "
        )
        text += f"{_percent(left)} of the angle; norms alone leave {_percent(alone)}; "
        text += f"in length it grows × {', '.join(f'{factor:.2f}' for factor in growth)}"
        return Verdict(max(left) < 1, text)

    return decide


def _percent(shares: Sequence[float]) -> str:
    """Return shares as text."""
    return ", ".join(f"{100 * share:.0f} %" for share in shares)


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
    clear, total, texts = 0, 0, []
    for group, speed in result["speed"].items():
        for partition, at in speed["at_boundaries"].items():
            if at is None:
                continue
            total += 1
            clear += at["ratio"] > 1 and at["above_random"] >= _CLEARLY
            if group != "registers":
                beats = f"beats {100 * at['above_random']:.0f} %"
                texts.append(f"{group} {partition}: {at['ratio']:.2f} ({beats})")
    if not total:
        return None
    return Verdict(clear > total / 2, f"clear in {clear} of {total} cases; {', '.join(texts)}")


def _loses_rank(result: dict) -> Verdict:
    """Decide whether updates become low in rank."""
    seen, texts = True, []
    for kind in ("stable", "effective"):
        ranks = _mean_of(result, "update_rank", kind)[1:]
        quarter = max(1, len(ranks) // 4)
        first, last = ranks[:quarter].mean(), ranks[-quarter:].mean()
        seen &= last < first
        texts.append(f"{kind} rank {first:.2f} → {last:.2f}")
    return Verdict(seen, f"{', '.join(texts)} (first and last quarter)")


def _coherent(result: dict) -> Verdict:
    """Decide whether patches align late."""
    kappa = _mean_of(result, "coherence", "states")
    half = len(kappa) // 2
    rises_late = kappa[-1] - kappa[half] > kappa[half] - kappa[0]
    return Verdict(kappa[-1] == kappa.max() and rises_late, f"κ {_arrows(kappa)}")


def _coherent_updates(result: dict) -> Verdict:
    """Decide whether updates of patches point the same way."""
    kappa = _mean_of(result, "coherence", "updates")
    return Verdict(kappa.min() > 0.5, f"κ of updates {kappa.min():.2f} to {kappa.max():.2f}")


def _swaps_differ(other: str) -> Callable[[dict], Verdict | None]:
    """Decide whether layers of the same phase stand in for each other better than others."""

    def decide(result: dict) -> Verdict | None:
        texts, seen = [], True
        number = str(max(SWAPPED))
        for partition in map(partition_name, result["partitions"]):
            kinds = result.get("layer_swap", {}).get(partition, {})
            both = [kinds.get(kind, {}).get(number) for kind in ("same_phase", other)]
            if None in both:
                continue
            # over the draws, by the accuracy where there is a head
            figure = "accuracy" if "accuracy" in both[0] else "cosine"
            same, across = (np.array(swaps[figure]["mean"]) for swaps in both)
            error = np.sqrt(same.var(ddof=1) / len(same) + across.var(ddof=1) / len(across))
            gain = same.mean() - across.mean()
            clear = by_interval(gain - 2 * error, gain + 2 * error) if len(same) > 1 else None
            seen = clear if seen is True or clear is False else seen
            means = f"{same.mean():.3f} against {across.mean():.3f}"
            texts.append(f"{partition}: {means} (± {error:.3f})")
        if not texts:
            return None
        return Verdict(seen, f"{figure} with {number} layers swapped, {'; '.join(texts)}")

    return decide


def _contrast(result: dict) -> Verdict | None:
    """Decide whether phases are tighter than random ones."""
    seen, texts = True, []
    for partition, figures in result.get("phase_contrast", {}).items():
        contrast = figures["contrast"]
        if contrast is None or not figures["random"]:
            continue
        beaten = {}
        for kind in ("random", "shuffled"):
            beaten[kind] = np.mean([c is None or contrast > c for c in figures[kind]])
        seen &= min(beaten.values()) >= _CLEARLY
        texts.append(
            f"{partition}: {contrast:.2f}, beats {100 * beaten['random']:.0f} % of random runs, "
            f"{100 * beaten['shuffled']:.0f} % of shuffled layers"
        )
    return Verdict(seen, "; ".join(texts)) if texts else None


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


def _linear(result: dict) -> Verdict | None:
    """Decide whether the linear map of a phase predicts its end better than the identity."""
    seen, texts = True, []
    for group, spans in result.get("linear_modes", {}).items():
        gains = [cosines["map"][-1] - cosines["identity"][-1] for cosines in spans.values()]
        seen &= min(gains) > 0
        texts.append(f"{group} {min(gains):+.3f} to {max(gains):+.3f}")
    if not texts:
        return None
    return Verdict(seen, f"cosine over a whole phase, map − identity: {', '.join(texts)}")


def _identity_catches_up(result: dict) -> Verdict | None:
    """Decide whether, late in depth, the identity predicts a step nearly as well."""
    gains = []
    for phases in result["partitions"]:
        if len(phases) < 2:
            continue
        ends = (f"1-{phases[0]}", f"{sum(phases[:-1]) + 1}-{sum(phases)}")
        for spans in result.get("linear_modes", {}).values():
            gains.append([spans[end]["map"][0] - spans[end]["identity"][0] for end in ends])
    if not gains:
        return None
    first, last = np.transpose(gains)
    smaller = int((last < first).sum())
    return Verdict(
        smaller > len(gains) / 2,
        f"one step, map − identity, first → last phase: {first.mean():+.3f} → {last.mean():+.3f}; "
        f"smaller in {smaller} of {len(gains)} cases",
    )


CLAIMS = [
    Claim("Directions converge: γ rises to 1", _PAPER,
          "every group's γ rises at nine of ten layers", _converges),
    Claim("The rise is S-shaped", _PAPER,
          "every group's γ rises most in the middle half of the layers", _s_shaped),
    Claim("Classes end in angular basins", _PAPER,
          "the silhouette at the last layer is above 0 and above that at the first", _basins),
    Claim("The angle of a pushed cls token shrinks", _PAPER,
          "less than the pushed angle is left at the end, at the smallest ε, be it by growing "
          "norms alone", _corrects("cls")),
    Claim("The angle of pushed patches shrinks", _PAPER,
          "the same for patches", _corrects("patches")),
    Claim("cls turns sharply late", _PAPER,
          "its largest turn, the first apart, is in the last quarter", _late_cls),
    Claim("Registers are slow, patches between, cls fast", _PAPER,
          "order of the mean turns after layer 1", _ordered_speeds),
    Claim("Speed jumps where phases meet", _PAPER,
          "ratio above 1 and above that of 95 % of random cuts, in most cases", _piecewise),
    Claim("Updates lose rank with depth", _PAPER,
          "both ranks are lower in the last quarter than in the first", _loses_rank),
    Claim("Patches align, late", _PAPER,
          "κ is largest at the end and rises more in the second half", _coherent),
    Claim("Updates of patches point the same way", _PAPER,
          "κ of updates is above ½ at every layer", _coherent_updates),
    Claim("Layers of one phase stand in for each other", _PAPER,
          "better than those of another phase, by two standard errors over the draws",
          _swaps_differ("other_phase")),
    Claim("… also against equally near layers of another phase", _OURS,
          "the same, with layers no farther away than a phase is long",
          _swaps_differ("other_phase_near")),
    Claim("Phases are tighter than random ones", _PAPER,
          "contrast above that of 95 % of random and of shuffled partitions", _contrast),
    Claim("A linear map a phase beats the identity", _OURS,
          "the map predicts the end of its phase better than the start does, in all phases",
          _linear),
    Claim("The linear map gains less over the identity in the last phase", _OURS,
          "one step ahead, it gains less there than in the first phase, in most cases",
          _identity_catches_up),
    Claim("With more time the state settles", _OURS,
          "the last block's last extra turn of the patches is below a tenth of its first, "
          "depth held at L", _settles),
]  # fmt: skip

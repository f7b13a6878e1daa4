"""What we see: each claim about depth as time, held against a model's figures.

A claim is a function of one model's result (`dynamics_study.ModelStudy.result`) that says whether
it is seen and shows the figures that decide; None where they are missing.
"""
# Over 300 lines by a few: a table of claims, a row each.

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .study import SWAPPED, partition_name

_CLEARLY = 0.95  # share of random partitions that a partition must beat
_PAPER, _FOLLOW_UP, _OURS = "arXiv 2512.19941", "arXiv 2605.07556", "a question of ours"
_Verdict = tuple[bool, str] | None


class _Claim(NamedTuple):
    """A sentence, who says it, by what it is decided here, and the function that decides."""

    sentence: str
    source: str
    criterion: str
    decide: Callable[[dict], _Verdict]


def _mean_of(result: dict, *keys: str) -> np.ndarray:
    """Return a figure's mean over the images."""
    for key in keys:
        result = result[key]
    return np.array(result["mean"])


def _quarters(values: np.ndarray) -> tuple[float, float]:
    """Return the mean of the first and of the last quarter of a curve over the layers."""
    quarter = max(1, len(values) // 4)
    return values[:quarter].mean(), values[-quarter:].mean()


def _arrows(values: np.ndarray, digits: int = 2) -> str:
    """Return a curve by its first, middle and last value."""
    return " → ".join(f"{values[n]:.{digits}f}" for n in (0, len(values) // 2, -1))


def _converges(result: dict) -> _Verdict:
    """Decide whether directions approach the last one layer by layer."""
    curves = {group: _mean_of(result, "convergence", group) for group in result["convergence"]}
    seen = all((np.diff(curve) > 0).mean() >= 0.9 for curve in curves.values())
    return seen, "; ".join(f"{group} {_arrows(curve)}" for group, curve in curves.items())


def _s_shaped(result: dict) -> _Verdict:
    """Decide whether the rise is slow, then fast, then slow."""
    steepest, seen = [], True
    for group in result["convergence"]:
        rises = np.diff(_mean_of(result, "convergence", group))
        layer, quarter = int(rises.argmax()) + 1, len(rises) / 4
        seen &= quarter < layer <= 3 * quarter
        steepest.append(f"{group} at layer {layer}")
    return seen, f"steepest: {', '.join(steepest)} of {result['depth']}"


def basins(result: dict) -> _Verdict:
    """Decide whether classes gather."""
    if "class_basins" not in result:
        return None
    own, other, silhouette = (
        _mean_of(result, "class_basins", name)
        for name in ("own_angle", "other_angle", "silhouette")
    )
    seen = silhouette[-1] > max(0, silhouette[1])
    return bool(seen), (
        f"silhouette {silhouette[1]:.2f} → {silhouette[-1]:.2f} (layers 1, {result['depth']}); at "
        f"the end {own[-1]:.0f}° to the own class, {other[-1]:.0f}° to the nearest other"
    )


def _corrects(group: str) -> Callable[[dict], _Verdict]:
    """Decide whether pushed tokens of a group come back."""

    def decide(result: dict) -> _Verdict:
        pushes = result.get("self_correction", {}).get(group)
        if not pushes:
            return None
        epsilon = min(pushes, key=float)
        left = {
            layer: angles["mean"][-1] / angles["mean"][0]
            for layer, angles in pushes[epsilon].items()
        }
        shares = ", ".join(f"{100 * share:.0f} %" for share in left.values())
        return max(left.values()) < 1, (
            f"of a push of {epsilon} after layer {', '.join(left)} is left at the end: {shares}"
        )

    return decide


def _late_cls(result: dict) -> _Verdict:
    """Decide whether the cls token turns most in the last quarter."""
    if "cls" not in result["speed"]:
        return None
    speed = _mean_of(result, "speed", "cls")
    fastest = int(speed[1:].argmax()) + 2
    seen = fastest > 0.75 * len(speed)
    return bool(seen), (
        f"the largest turn after layer 1 is at layer {fastest} of {len(speed)}: "
        f"{speed[fastest - 1]:.0f}°; the last layer's: {speed[-1]:.0f}°"
    )


def _ordered_speeds(result: dict) -> _Verdict:
    """Decide whether registers are slower than patches, and patches than cls."""
    if len(result["speed"]) < 3:
        return None
    speeds = {group: _mean_of(result, "speed", group)[1:].mean() for group in result["speed"]}
    seen = speeds["registers"] < speeds["patches"] < speeds["cls"]
    return bool(seen), ", ".join(f"{group} {speed:.0f}°" for group, speed in speeds.items())


def _piecewise(result: dict) -> _Verdict:
    """Decide whether speeds jump at the boundaries of phases."""
    jumps = {
        (group, partition): at
        for group, speed in result["speed"].items()
        for partition, at in speed["at_boundaries"].items()
        if at is not None
    }
    if not jumps:
        return None
    clear = sum(at["ratio"] > 1 and at["above_random"] >= _CLEARLY for at in jumps.values())
    ratios = ", ".join(
        f"{group} {partition}: {at['ratio']:.2f} (beats {100 * at['above_random']:.0f} %)"
        for (group, partition), at in jumps.items()
        if group != "registers"
    )
    return clear > len(jumps) / 2, f"clear in {clear} of {len(jumps)} cases; {ratios}"


def _loses_rank(result: dict) -> _Verdict:
    """Decide whether updates become low in rank."""
    lines, seen = [], True
    for kind in ("stable", "effective"):
        first, last = _quarters(_mean_of(result, "update_rank", kind)[1:])
        seen &= last < first
        lines.append(f"{kind} rank {first:.2f} → {last:.2f}")
    return bool(seen), f"{', '.join(lines)} (first and last quarter)"


def _coherent(result: dict) -> _Verdict:
    """Decide whether patches align late."""
    kappa = _mean_of(result, "coherence", "states")
    half = len(kappa) // 2
    seen = kappa[-1] == kappa.max() and kappa[-1] - kappa[half] > kappa[half] - kappa[0]
    return bool(seen), f"κ {_arrows(kappa)}"


def _coherent_updates(result: dict) -> _Verdict:
    """Decide whether updates of patches point the same way."""
    kappa = _mean_of(result, "coherence", "updates")
    return bool(kappa.min() > 0.5), f"κ of updates {kappa.min():.2f} to {kappa.max():.2f}"


def _swaps_differ(other: str) -> Callable[[dict], _Verdict]:
    """Decide whether layers of the same phase stand in for each other better than others."""

    def decide(result: dict) -> _Verdict:
        lines, seen = [], []
        for partition in map(partition_name, result["partitions"]):
            kinds = result.get("layer_swap", {}).get(partition, {})
            both = [kinds.get(kind, {}).get(str(max(SWAPPED))) for kind in ("same_phase", other)]
            if None in both:
                continue
            figure = "accuracy" if "accuracy" in both[0] else "cosine"
            same, across = (np.array(swaps[figure]["mean"]) for swaps in both)
            error = np.sqrt(same.var(ddof=1) / len(same) + across.var(ddof=1) / len(across))
            seen.append(len(same) > 1 and same.mean() - across.mean() > 2 * error)
            lines.append(
                f"{partition}: {same.mean():.3f} against {across.mean():.3f} (± {error:.3f})"
            )
        if not lines:
            return None
        return all(seen), f"{figure} with {max(SWAPPED)} layers swapped, {'; '.join(lines)}"

    return decide


def contrast(result: dict) -> _Verdict:
    """Decide whether phases are better than random ones."""
    lines, seen = [], True
    for partition, figures in result.get("phase_contrast", {}).items():
        if figures["contrast"] is None or not figures["random"]:
            continue
        beats = {
            kind: np.mean([c is None or figures["contrast"] > c for c in figures[kind]])
            for kind in ("random", "shuffled")
        }
        seen &= min(beats.values()) >= _CLEARLY
        lines.append(
            f"{partition}: {figures['contrast']:.2f}, beats {100 * beats['random']:.0f} % of "
            f"random runs, {100 * beats['shuffled']:.0f} % of shuffled layers"
        )
    return (bool(seen), "; ".join(lines)) if lines else None


def settles(result: dict) -> _Verdict:
    """Decide whether the state comes to rest when the last block goes on."""
    held = result.get("more_time", {}).get("held")
    if not held:
        return None
    speed, cosine = (_mean_of(held, name, "patches") for name in ("speed", "convergence"))
    line = (
        f"patches turn {speed[0]:.1f}° → {speed[-1]:.1f}° an application (m = 1, {len(speed)}), "
        f"cosine to x_L {cosine[-1]:.2f}"
    )
    if "accuracy" in held:
        accuracy = _mean_of(held, "accuracy")
        line += f"; accuracy {accuracy[0]:.3f} → {accuracy[-1]:.3f}"
    return bool(speed[-1] < 0.1 * speed[0]), line


def linear(result: dict) -> _Verdict:
    """Decide whether a linear map a phase predicts better than standing still."""
    lines, ahead = [], []
    for group, spans in result.get("linear_modes", {}).items():
        gains = [cosines["map"][-1] - cosines["identity"][-1] for cosines in spans.values()]
        ahead += [gain > 0 for gain in gains]
        lines.append(f"{group} {min(gains):+.3f} to {max(gains):+.3f}")
    if not lines:
        return None
    return all(ahead), f"cosine over a whole phase, map − identity: {', '.join(lines)}"


def _identity_catches_up(result: dict) -> _Verdict:
    """Decide whether, late in depth, standing still predicts nearly as well."""
    gains = []
    for phases in (phases for phases in result["partitions"] if len(phases) > 1):
        for spans in result.get("linear_modes", {}).values():
            ends = (f"1-{phases[0]}", f"{sum(phases[:-1]) + 1}-{sum(phases)}")
            first, last = (spans[end] for end in ends)
            gains.append([cosines["map"][0] - cosines["identity"][0] for cosines in (first, last)])
    if not gains:
        return None
    gains = np.array(gains)
    later = int((gains[:, 1] < gains[:, 0]).sum())
    return later > len(gains) / 2, (
        f"one step, map − identity, first → last phase: {gains[:, 0].mean():+.3f} → "
        f"{gains[:, 1].mean():+.3f}; smaller in {later} of {len(gains)} cases"
    )


CLAIMS = [
    _Claim("Directions converge: γ rises to 1", _PAPER,
          "every group's γ rises at nine of ten layers", _converges),
    _Claim("The rise is S-shaped", _PAPER,
          "every group's γ rises most in the middle half of the layers", _s_shaped),
    _Claim("Classes end in angular basins", _PAPER,
          "the silhouette at the last layer is above 0 and above that at the first", basins),
    _Claim("A pushed cls token bends back", _PAPER,
          "less than the pushed angle is left at the end, at the smallest ε", _corrects("cls")),
    _Claim("Pushed patches bend back", _PAPER,
          "the same for patches", _corrects("patches")),
    _Claim("cls turns sharply late", _PAPER,
          "its largest turn, the first apart, is in the last quarter", _late_cls),
    _Claim("Registers are slow, patches between, cls fast", _PAPER,
          "order of the mean turns after layer 1", _ordered_speeds),
    _Claim("Speed jumps where phases meet", _PAPER,
          "ratio above 1 and above that of 95 % of random cuts, in most cases", _piecewise),
    _Claim("Updates lose rank with depth", _PAPER,
          "both ranks are lower in the last quarter than in the first", _loses_rank),
    _Claim("Patches align, late", _PAPER,
          "κ is largest at the end and rises more in the second half", _coherent),
    _Claim("Updates of patches point the same way", _PAPER,
          "κ of updates is above ½ at every layer", _coherent_updates),
    _Claim("Layers of one phase stand in for each other", _PAPER,
          "better than those of another phase, by two standard errors over the draws",
          _swaps_differ("other_phase")),
    _Claim("… also against equally near layers of another phase", _OURS,
          "the same, with layers no farther away than a phase is long",
          _swaps_differ("other_phase_near")),
    _Claim("Phases are tighter than random ones", _PAPER,
          "contrast above that of 95 % of random and of shuffled partitions", contrast),
    _Claim("A phase is nearly linear", _FOLLOW_UP,
          "one map a phase predicts its end better than standing still, in all phases", linear),
    _Claim("Late, standing still predicts as well", _FOLLOW_UP,
          "the map gains less in the last phase than in the first, in most cases",
          _identity_catches_up),
    _Claim("With more time the state settles", _OURS,
          "the last block's last extra turn of the patches is below a tenth of its first, "
          "depth held at L", settles),
]  # fmt: skip


def evaluate_claims(results: list[dict]) -> list[dict]:
    """Return every claim with its verdict for every model: `seen` (or None) and `figures`."""
    judged = []
    for claim in CLAIMS:
        decided = {result["model"]: claim.decide(result) or (None, "") for result in results}
        verdicts = {
            model: {"seen": seen, "figures": text} for model, (seen, text) in decided.items()
        }
        said = {name: getattr(claim, name) for name in ("sentence", "source", "criterion")}
        judged.append({**said, "verdicts": verdicts})
    return judged

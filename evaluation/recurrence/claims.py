"""What a study says to the claims of the paper: each with a criterion that figures decide.

The criteria are ours, as the paper states none. Two were made stricter after a first look at the
figures of the digits: a pair a teacher in rank correlations, and every seed for what corrections
and experts must pass. Each turned one claim from held to not held.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from raptor_hf.phases.stability import partition_agreement

from .statistics import correlation, difference, mean_in_words, saturation, values_of

_PAPER, _OURS, _REVIEWERS = "paper", "ours", "the paper's reviewers"
_COMPARED = ("2", "3", "4")  # numbers of phases that teachers and sizes are compared by


class _Claim(NamedTuple):
    """A claim: `decide` gives (whether it holds, the figures in words), or None without figures."""

    sentence: str
    source: str
    criterion: str
    decide: Callable[[dict], tuple[bool, str] | None]


def _few_blocks_do(study: dict):
    """Decide whether L / 4 blocks reproduce nearly all of what the states vary by."""
    rows = study.get("gap")
    if not rows:
        return None
    depth = len(rows[0]["r2"]["layers"]["all"])
    k = max((k for k in {row["k"] for row in rows} if k <= depth // 4), default=None)
    if k is None:
        return None
    r2 = values_of(rows, "r2", k=k)
    return r2.mean() >= 0.9, f"k = {k} of {depth} layers: R² {mean_in_words(r2)}"


def _more_blocks_help(study: dict):
    """Decide whether the gap falls with every further block, until it saturates."""
    rows = study.get("gap")
    if not rows:
        return None
    ks = sorted({row["k"] for row in rows})
    means = [values_of(rows, "gap", k=k).mean() for k in ks]
    end = saturation(rows)
    text = ", ".join(f"k = {k}: {gap:.3f}" for k, gap in zip(ks, means, strict=True))
    note = f"; saturated from k = {end}" if end else "; not saturated"
    falling = [b < a for k, a, b in zip(ks, means, means[1:], strict=False) if not end or k < end]
    return bool(falling) and all(falling), f"ε over the spread, {text}{note}"


def _cut_matters(kind: str, figure: str):
    """Decide whether max-cut is better than another kind of partition at every k.

    A k at which both are the same partition says nothing.
    """

    def decide(study: dict):
        rows = study.get("partitions") or []
        pairs = {}
        for k in sorted({row["k"] for row in rows}):
            parts = [
                [row["parts"] for row in rows if (row["k"], row["partition"]) == (k, name)]
                for name in ("max-cut", kind)
            ]
            if parts[0] == parts[1]:
                continue
            pairs[k] = [values_of(rows, figure, k=k, partition=name) for name in ("max-cut", kind)]
        return _better_at_every_k(pairs, lambda mean, low: low > 0)

    return decide


def _better_at_every_k(
    pairs: dict[int, list[np.ndarray]], is_better: Callable[[float, float], bool]
) -> tuple[bool, str] | None:
    """Decide whether the first of two kinds is better at every k where both have figures.

    Args:
        pairs: figures of both, over seeds.
        is_better: of the difference of the means, and the lower end of its interval.
    """
    found = {k: difference(*pair) for k, pair in pairs.items() if all(map(len, pair))}
    if not found:
        return None
    texts = [
        f"k = {k}: {mean:+.4f} [{low:+.4f}, {high:+.4f}]" for k, (mean, low, high) in found.items()
    ]
    return all(is_better(mean, low) for mean, low, _ in found.values()), "; ".join(texts)


def drop_rate_table(study: dict) -> dict[str, np.ndarray]:
    """Return figures of teachers at several drop rates, an entry a student."""
    rows = [row for row in study.get("training") or [] if _is_rate(row["teacher"])]
    maps = [study["maps"][row["teacher"]] for row in rows]
    return {
        "drop rate": np.array([phase_map["drop_path_rate"] for phase_map in maps]),
        "similarity": np.array([phase_map["similarity"] for phase_map in maps]),
        "contrast": np.array([phase_map["contrast"] for phase_map in maps]),
        "R² cls": np.array([row["r2"]["mean"]["cls"] for row in rows]),
        "R² patches": np.array([row["r2"]["mean"]["patches"] for row in rows]),
        "ε / spread": np.array([np.mean(row["to_spread"]["all"]) for row in rows]),
        "student's accuracy": np.array([row["accuracy"] for row in rows], dtype=float),
        "teacher's accuracy": np.array([m["accuracy"] for m in maps], dtype=float),
    }


def _is_rate(name: str) -> bool:
    """Return whether a teacher is one of the series of drop rates."""
    return name == "teacher" or name.startswith("drop_")


def _rises(figure: str, with_what: str = "drop rate", sign: int = 1):
    """Decide whether a figure of the teachers rises (or, with −1, falls) with another one."""

    def decide(study: dict):
        table = drop_rate_table(study)
        rates = sorted(set(table["drop rate"]))
        if len(rates) < 3:
            return None
        # a pair a teacher: students of one teacher are no independent witnesses
        pairs = [
            np.array([table[name][table["drop rate"] == rate].mean() for rate in rates])
            for name in (with_what, figure)
        ]
        mean, low, high = correlation(*pairs)
        text = f"ρ = {mean:+.2f} [{low:+.2f}, {high:+.2f}], {len(rates)} teachers"
        return min(sign * low, sign * high) > 0, text

    return decide


def _at_time(first: str, second: str, figures: Sequence[str]):
    """Decide whether figures of one teacher are above those of another."""

    def decide(study: dict):
        rows, maps = study.get("training") or [], study["maps"]
        if not {first, second} <= {row["teacher"] for row in rows}:
            return None
        texts, above = [], []
        for figure in figures:
            if figure == "similarity":
                values = [maps[name]["similarity"] for name in (first, second)]
            else:
                values = [values_of(rows, figure, teacher=name).mean() for name in (first, second)]
            above.append(values[0] > values[1])
            texts.append(f"{figure} {values[0]:.3f} ({first}), {values[1]:.3f} ({second})")
        return all(above), "; ".join(texts)

    return decide


def _stable(study: dict):
    """Decide whether max-cut finds the same phases in bootstrap draws of the images."""
    stability = study["maps"]["teacher"].get("stability")
    if not stability:
        return None
    shares = {k: found["same"] for k, found in stability.items()}
    text = ", ".join(f"k = {k}: {share:.0%}" for k, share in shares.items())
    return min(shares.values()) >= 0.9, f"share of the draws, {text}"


def _cut_alike(others: Callable[[dict], dict[str, dict[str, list[int]]]]):
    """Decide whether phases by k of others have boundaries in common with the teacher's."""

    def decide(study: dict):
        own, found = study["maps"]["teacher"]["phases"], others(study["maps"])
        agreements = {}
        for name, phases in found.items():
            shares = [partition_agreement(own[k], phases[k]) for k in _COMPARED if k in phases]
            agreements[name] = float(np.mean(shares))
        if not agreements:
            return None
        text = ", ".join(f"{name}: {share:.2f}" for name, share in agreements.items())
        return np.mean(list(agreements.values())) >= 0.5, f"of k = {', '.join(_COMPARED)}: {text}"

    return decide


def is_richer(kind: str) -> bool:
    """Return whether blocks have corrections or experts."""
    return kind.startswith("corrections") or kind.endswith("experts")


def _richer_wins(study: dict):
    """Decide whether a richer Raptor is better than a plain one of as many bytes."""
    rows = study.get("alternatives") or []
    plain = sorted(
        (row["stored_parameters"], values_of(rows, "r2", kind="Raptor", k=row["k"]).mean())
        for row in {r["k"]: r for r in rows if r["kind"] == "Raptor"}.values()
    )
    kinds = sorted({(r["kind"], r["k"]) for r in rows if is_richer(r["kind"])})
    if not plain or not kinds:
        return None
    wins, best = [], []
    for kind, k in kinds:
        size = next(r["stored_parameters"] for r in rows if r["kind"] == kind and r["k"] == k)
        line = float(np.interp(size, *zip(*plain, strict=True)))
        above = values_of(rows, "r2", kind=kind, k=k) - line
        wins.append(above.min() > 0)
        best.append((above.mean(), f"{kind}, k = {k}: {above.mean():+.4f}"))
    texts = [text for _, text in sorted(best, reverse=True)[:3]]
    return any(wins), f"{sum(wins)} of {len(wins)} do; the best on average: {'; '.join(texts)}"


def _beats(other: str, figure: str):
    """Decide whether a plain Raptor is better than another kind at every k."""

    def decide(study: dict):
        rows = study.get("alternatives") or []
        pairs = {
            k: [values_of(rows, figure, kind=kind, k=k) for kind in ("Raptor", other)]
            for k in sorted({row["k"] for row in rows if row["kind"] == other})
        }
        return _better_at_every_k(pairs, lambda mean, low: mean > 0)

    return decide


def _not_here(_study: dict) -> None:
    """Decide nothing: the figures need other data."""


CLAIMS = [
    _Claim("Few blocks reproduce all layers", _PAPER,
           "R² ≥ 0.9 over all layers and tokens with L / 4 blocks", _few_blocks_do),
    _Claim("ε falls with k until it saturates", _REVIEWERS,
           "the mean gap falls with every block up to the one that adds less than 5 %",
           _more_blocks_help),
    _Claim("Max-cut beats random runs: R²", _PAPER,
           "the 95 % interval of the difference lies above 0 at every k",
           _cut_matters("random", "r2")),
    _Claim("Max-cut beats random runs: accuracy", _PAPER, "the same",
           _cut_matters("random", "accuracy")),
    _Claim("Max-cut beats shuffled layers: R²", _PAPER, "the same",
           _cut_matters("shuffled", "r2")),
    _Claim("Max-cut beats shuffled layers: accuracy", _PAPER, "the same",
           _cut_matters("shuffled", "accuracy")),
    _Claim("Max-cut beats uniform runs: R²", _OURS, "the same", _cut_matters("uniform", "r2")),
    _Claim("Phases are stable over images", _REVIEWERS,
           "the same phases in 90 % of 200 bootstrap draws, at every k", _stable),
    _Claim("Phases are stable over seeds of the teacher", _REVIEWERS,
           "half of the boundaries in common on average",
           _cut_alike(lambda maps: {name: found["phases"] for name, found in maps.items()
                                    if name.startswith("seed_")})),
    _Claim("Phases are stable over image sizes", _REVIEWERS, "the same",
           _cut_alike(lambda maps: {f"{pixels} px": phases
                                    for pixels, phases in maps["teacher"]["sizes"].items()})),
    _Claim("Stochastic depth makes layers alike", _PAPER,
           "rank correlation with the drop rate above 0, by its 95 % interval",
           _rises("similarity")),
    _Claim("… sharpens phases", _PAPER, "the same", _rises("contrast")),
    _Claim("… lets a Raptor follow: cls", _PAPER, "the same", _rises("R² cls")),
    _Claim("… lets a Raptor follow: patches", _PAPER, "the same", _rises("R² patches")),
    _Claim("… and lowers ε", _OURS, "rank correlation below 0", _rises("ε / spread", sign=-1)),
    _Claim("Alike layers are easier to follow", _PAPER,
           "rank correlation of layer similarity and R² of patches above 0",
           _rises("R² patches", "similarity")),
    _Claim("An untrained ViT is easier to follow than a trained one", _PAPER,
           "its Raptors' R² is higher", _at_time("untrained", "teacher", ["r2"])),
    _Claim("Overfitting lowers similarity and fidelity", _PAPER,
           "both are higher before it", _at_time("teacher", "overfitted", ["similarity", "r2"])),
    _Claim("All layers as targets beat the last alone: accuracy", _OURS,
           "a Raptor's accuracy is higher at every k", _beats("Raptor, last state", "accuracy")),
    _Claim("A Raptor beats a shallow ViT of as many bytes: accuracy", _REVIEWERS,
           "higher at every k, for the same compute of training",
           _beats("few layers, last state", "accuracy")),
    _Claim("Corrections or experts by depth pass the plain Raptor at equal bytes", _OURS,
           "with every seed, one lies above the line between plain Raptors of several k",
           _richer_wins),
    _Claim("81 to 83 % on ImageNet-1k with k = 2 to 4", _PAPER,
           "needs a DINOv2-B, ImageNet-1k and days of a GPU", _not_here),
    _Claim("Partitions on CIFAR-100, ten seeds", _PAPER,
           "needs CIFAR-100: training/recipes/small_images_study.yaml", _not_here),
]  # fmt: skip


def judge(study: dict) -> list[dict]:
    """Return every claim with its verdict: reproduced, not reproduced, or not testable here."""
    words, judged = {True: "reproduced", False: "not reproduced"}, []
    for claim in CLAIMS:
        decided = claim.decide(study)
        verdict = "not testable here" if decided is None else words[bool(decided[0])]
        said = {name: getattr(claim, name) for name in ("sentence", "source", "criterion")}
        judged.append({**said, "verdict": verdict, "figures": decided[1] if decided else ""})
    return judged

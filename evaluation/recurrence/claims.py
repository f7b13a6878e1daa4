"""Claims about block recurrence, each decided by the figures of a study.

The criteria are ours, as the paper states none. Three were changed after a first look at the
figures of the digits. Two became stricter: one pair a teacher in rank correlations, and every seed
for corrections and experts (both are gone since). One became looser: a k at which two kinds of
partition are the same partition is left out; with it, max-cut beat uniform runs.

A review changed more: an interval that holds 0 is "can't tell", no longer "not reproduced"; the
untrained ViT is judged by cls, too, as a copy of its embeddings passes over all tokens; overfitting
is compared at the same drop rate; saturation is a claim of its own; cls by its median layer.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from evaluation.claims import Claim, Verdict, all_of, by_interval
from raptor_hf.phases.stability import partition_agreement

from .measures import (
    correlation,
    difference,
    mean_in_words,
    median_r2,
    saturation,
    values_of,
)

_PAPER, _OURS, _REVIEWERS = "paper", "ours", "the paper's reviewers"
_COMPARED = ("2", "3", "4")  # numbers of phases that teachers and sizes are compared by
_Decide = Callable[[dict], Verdict | None]


def _few_blocks_do(study: dict) -> Verdict | None:
    """Decide whether L / 4 blocks reproduce nearly all of the variance of the states."""
    rows = study.get("gap")
    if not rows:
        return None
    depth = len(rows[0]["r2"]["layers"]["all"])
    few = [row["k"] for row in rows if row["k"] <= depth // 4]
    if not few:
        return None
    r2 = values_of(rows, "r2", k=max(few))
    return Verdict(r2.mean() >= 0.9, f"k = {max(few)} of {depth} layers: R² {mean_in_words(r2)}")


def _more_blocks_help(study: dict) -> Verdict | None:
    """Decide whether the gap falls with every further block."""
    rows = study.get("gap")
    if not rows:
        return None
    ks = sorted({row["k"] for row in rows})
    means = [values_of(rows, "gap", k=k).mean() for k in ks]
    text = ", ".join(f"k = {k}: {gap:.3f}" for k, gap in zip(ks, means, strict=True))
    falls = len(ks) > 1 and bool((np.diff(means) < 0).all())
    return Verdict(falls, f"ε over the spread, {text}")


def _saturates(study: dict) -> Verdict | None:
    """Decide whether a further block adds little from some k on."""
    rows = study.get("gap")
    if not rows:
        return None
    end = saturation(rows)
    return Verdict(end is not None, f"from k = {end}" if end else "not up to the largest k")


def _better_at_every_k(pairs: Mapping[int, Sequence[np.ndarray]]) -> Verdict | None:
    """Decide by 95 % intervals whether the first of two kinds is better at every k.

    Args:
        pairs: figures of both, over seeds; a k without figures of both is left out.
    """
    clear, texts = [], []
    for k, (first, second) in pairs.items():
        if len(first) and len(second):
            mean, low, high = difference(first, second)
            clear.append(by_interval(low, high))
            texts.append(f"k = {k}: {mean:+.4f} [{low:+.4f}, {high:+.4f}]")
    if not texts:
        return None
    return Verdict(all_of(clear), "; ".join(texts))


def _cut_matters(other: str, figure: str) -> _Decide:
    """Decide whether max-cut is better than another kind of partition at every k.

    A k at which both are the same partition is left out.
    """

    def decide(study: dict) -> Verdict | None:
        rows, pairs = study.get("partitions") or [], {}
        for k in sorted({row["k"] for row in rows}):
            # the partitions of both kinds, over seeds
            parts: dict[str, list] = {"max-cut": [], other: []}
            for row in rows:
                if row["k"] == k and row["partition"] in parts:
                    parts[row["partition"]].append(row["parts"])
            if parts["max-cut"] != parts[other]:
                pairs[k] = [values_of(rows, figure, k=k, partition=kind) for kind in parts]
        return _better_at_every_k(pairs)

    return decide


def _beats(other: str, figure: str) -> _Decide:
    """Decide whether a plain Raptor is better than another kind at every k."""

    def decide(study: dict) -> Verdict | None:
        rows, pairs = study.get("alternatives") or [], {}
        for k in sorted({row["k"] for row in rows if row["kind"] == other}):
            pairs[k] = [values_of(rows, figure, kind=kind, k=k) for kind in ("Raptor", other)]
        return _better_at_every_k(pairs)

    return decide


def _drop_rate_table(study: dict) -> dict[str, np.ndarray]:
    """Return figures of the teachers of several drop rates, an entry a student."""
    table: dict[str, list] = {}
    for row in study.get("training") or []:
        if row["teacher"] != "teacher" and not row["teacher"].startswith("drop_"):
            continue
        found = study["maps"][row["teacher"]]
        for name, value in {
            "drop rate": found["drop_path_rate"],
            "similarity": found["similarity"],
            "contrast": found["contrast"],
            "R² cls": median_r2(row, "cls"),
            "R² patches": row["r2"]["mean"]["patches"],
            "ε / spread": np.mean(row["to_spread"]["all"]),
        }.items():
            table.setdefault(name, []).append(value)
    return {name: np.array(values, dtype=float) for name, values in table.items()}


def _rises(figure: str, with_what: str = "drop rate", sign: int = 1) -> _Decide:
    """Decide whether a figure of the teachers rises (or, with −1, falls) with another one."""

    def decide(study: dict) -> Verdict | None:
        table = _drop_rate_table(study)
        rates = sorted(set(table.get("drop rate", ())))
        if len(rates) < 3:
            return None
        # a pair a teacher: students of one teacher are not independent
        pairs = []
        for name in (with_what, figure):
            pairs.append(np.array([table[name][table["drop rate"] == r].mean() for r in rates]))
        rho, low, high = correlation(*pairs)
        text = f"ρ = {rho:+.2f} [{low:+.2f}, {high:+.2f}], {len(rates)} teachers"
        return Verdict(by_interval(*sorted((sign * low, sign * high))), text)

    return decide


def _above(first: str, second: str, figures: Sequence[str]) -> _Decide:
    """Decide whether figures of one teacher are above those of another.

    By more than the teachers of other seeds differ: without any, nobody can tell.
    """

    def decide(study: dict) -> Verdict | None:
        rows, maps = study.get("training") or [], study["maps"]
        trained = {row["teacher"] for row in rows}
        if not {first, second} <= trained:
            return None

        def value(teacher: str, figure: str) -> float:
            """Return a figure of a teacher."""
            if figure == "similarity":
                return maps[teacher]["similarity"]
            return float(values_of(rows, figure, teacher=teacher).mean())

        # the teacher's own seeds are the measure of a difference
        seeds = [name for name in trained if name == "teacher" or name.startswith("seed_")]
        clear, texts = [], []
        for figure in figures:
            of_seeds = [value(name, figure) for name in seeds]
            spread = np.ptp(of_seeds) if len(seeds) > 1 else np.inf
            values = value(first, figure), value(second, figure)
            gain = values[0] - values[1]
            clear.append(by_interval(gain - spread, gain + spread))
            texts.append(
                f"{figure} {values[0]:.3f} ({first}), {values[1]:.3f} ({second}), seeds differ by "
                f"{spread:.3f}"
            )
        return Verdict(all_of(clear), "; ".join(texts))

    return decide


def _stable(study: dict) -> Verdict | None:
    """Decide whether max-cut finds the same phases in bootstrap draws of the images."""
    stability = study["maps"]["teacher"].get("stability")
    if not stability:
        return None
    shares = {k: cut["same"] for k, cut in stability.items()}
    text = ", ".join(f"k = {k}: {share:.0%}" for k, share in shares.items())
    return Verdict(min(shares.values()) >= 0.9, f"share of the draws, {text}")


def _cut_alike(others: Callable[[dict], dict[str, dict[str, list[int]]]]) -> _Decide:
    """Decide whether other partitions, by k, have boundaries in common with the teacher's.

    Args:
        others: takes the maps of the teachers to partitions by name and k.
    """

    def decide(study: dict) -> Verdict | None:
        own, agreements = study["maps"]["teacher"]["phases"], {}
        for name, phases in others(study["maps"]).items():
            shares = [partition_agreement(own[k], phases[k]) for k in _COMPARED if k in phases]
            agreements[name] = float(np.mean(shares))
        if not agreements:
            return None
        text = ", ".join(f"{name}: {share:.2f}" for name, share in agreements.items())
        mean = np.mean(list(agreements.values()))
        return Verdict(mean >= 0.5, f"of k = {', '.join(_COMPARED)}: {text}")

    return decide


def _other_seeds(maps: dict) -> dict[str, dict[str, list[int]]]:
    """Return the phases of teachers of other seeds."""
    return {name: maps[name]["phases"] for name in maps if name.startswith("seed_")}


def _other_sizes(maps: dict) -> dict[str, dict[str, list[int]]]:
    """Return the phases of the teacher at other sizes of the images."""
    return {f"{pixels} px": phases for pixels, phases in maps["teacher"]["sizes"].items()}


CLAIMS = [
    Claim("Few blocks reproduce all layers", _PAPER,
          "R² ≥ 0.9 over all layers and tokens with L / 4 blocks", _few_blocks_do),
    Claim("ε falls with every further block", _REVIEWERS,
          "the mean gap falls from each k to the next", _more_blocks_help),
    Claim("… and saturates", _REVIEWERS,
          "from some k on a further block lowers the gap by less than 5 %", _saturates),
    Claim("Max-cut beats random runs: R²", _PAPER,
          "the 95 % interval of the difference lies above 0 at every k",
          _cut_matters("random", "r2")),
    Claim("Max-cut beats random runs: accuracy", _PAPER, "the same",
          _cut_matters("random", "accuracy")),
    Claim("Max-cut beats shuffled layers: R²", _PAPER, "the same",
          _cut_matters("shuffled", "r2")),
    Claim("Max-cut beats shuffled layers: accuracy", _PAPER, "the same",
          _cut_matters("shuffled", "accuracy")),
    Claim("Repeated max-cut beats uniform runs: R²", _OURS,
          "the same; exact max-cut may be the uniform partition itself (k = 3 on the digits)",
          _cut_matters("uniform", "r2")),
    Claim("Phases are stable over images", _REVIEWERS,
          "the same phases in 90 % of 200 bootstrap draws, at every k", _stable),
    Claim("Phases are stable over seeds of the teacher", _REVIEWERS,
          "half of the boundaries in common on average", _cut_alike(_other_seeds)),
    Claim("Phases are stable over image sizes", _REVIEWERS, "the same", _cut_alike(_other_sizes)),
    Claim("Stochastic depth makes layers alike", _PAPER,
          "rank correlation with the drop rate above 0, by its 95 % interval",
          _rises("similarity")),
    Claim("… sharpens phases", _PAPER, "the same", _rises("contrast")),
    Claim("… lets a Raptor follow: cls", _PAPER, "the same", _rises("R² cls")),
    Claim("… lets a Raptor follow: patches", _PAPER, "the same", _rises("R² patches")),
    Claim("… and lowers ε", _OURS, "rank correlation below 0", _rises("ε / spread", sign=-1)),
    Claim("Alike layers are easier to follow", _PAPER,
          "rank correlation of layer similarity and R² of patches above 0",
          _rises("R² patches", "similarity")),
    Claim("An untrained ViT is easier to follow than a trained one", _PAPER,
          "its Raptors' R² is higher by more than seeds differ, over all tokens and for cls (median"
          " layer); over all tokens alone a copy of its embeddings would do",
          _above("untrained", "teacher", ["r2", "median cls"])),
    Claim("Overfitting lowers similarity and fidelity", _PAPER,
          "both are higher for drop_0, by more than seeds differ; it has the same drop rate, and"
          " label smoothing, weight decay and new views besides",
          _above("drop_0", "overfitted", ["similarity", "r2"])),
    Claim("All layers as targets beat the last alone: accuracy", _OURS,
          "a Raptor's accuracy is higher at every k, by the 95 % interval",
          _beats("Raptor, last state", "accuracy")),
    Claim("A Raptor beats a shallow ViT of as many bytes: accuracy", _REVIEWERS,
          "higher at every k by the 95 % interval, for the same compute of training",
          _beats("few layers, last state", "accuracy")),
]  # fmt: skip

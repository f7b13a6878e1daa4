"""Claims about depth as time, each decided by the figures of one network beside those of nulls.

A figure is a number an image, signed such that the claim says "above 0". The claim is seen where
its mean over the images lies above 0 and above that of a further untrained network, and of one with
its layers in random order. The criteria are ours, as the paper states none.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from evaluation.verdicts import (
    Claim,
    Judged,
    above_nulls,
    claims_details,
    claims_table,
    figures_table,
    judge_networks,
)

_PAPER, _OURS = "arXiv 2512.19941", "a question of ours"
_SETTLED = 0.1  # of the first extra update of a held block
_Figures = Mapping[tuple[str, ...], np.ndarray]


def figures_of_claims(
    found: _Figures, partitions: Sequence[Sequence[int]]
) -> dict[str, np.ndarray]:
    """Return the figures that claims are decided by, (n,) each, from those of a `NetworkStudy`.

    Args:
        found: figures of n images, (n, …) each, by name.
        partitions: of the layers into phases.
    """
    speed = {key[1]: values for key, values in found.items() if key[0] == "speed"}
    layers = speed["patches"].shape[1]
    # the last quarter, which a network of three layers has not
    late, early = slice(layers - layers // 4, None), slice(1, layers - layers // 4)
    figures = {}

    # turns
    if "cls" in speed:
        # cosines to the last state, less the product of the cosines between neighbours
        turns = np.cumprod(np.cos(np.deg2rad(speed["cls"]))[:, ::-1], axis=1)[:, ::-1]
        figures["cls, direction"] = (found["convergence", "cls"][:, :-1] - turns).mean(axis=1)
        if layers >= 4:
            before = speed["cls"][:, early].mean(axis=1)
            figures["cls, late"] = speed["cls"][:, late].mean(axis=1) - before
    if len(speed) == 3:
        means = {name: values[:, 1:].mean(axis=1) for name, values in speed.items()}
        figures["order, patches over registers"] = means["patches"] - means["registers"]
        figures["order, cls over patches"] = means["cls"] - means["patches"]
    jumps = [_jump(values, phases) for values in speed.values() for phases in partitions]
    if jumps := [jump for jump in jumps if jump is not None]:
        figures["jump"] = np.mean(jumps, axis=0)

    # updates
    rank, coherence = found["updates", "effective rank"], found["updates", "coherence"]
    if layers >= 4:
        figures["rank"] = np.log(rank[:, early].mean(axis=1) / rank[:, late].mean(axis=1))
        figures["align"] = coherence[:, late].mean(axis=1) - coherence[:, early].mean(axis=1)

    # the log of the factor by which a push loses length, and by which a held block calms down
    for _, group, start, name in [key for key in found if key[-1:] == ("angle",)]:
        angle, alone = found["push", group, start, name], found["push", group, start, "norms_alone"]
        figures[f"{group}, push after {start}"] = np.log(alone[:, -1] / angle[:, -1])
    if ("held", "update") in found:
        huge = np.finfo(np.float32).max  # of a state that has overflown
        updates = np.nan_to_num(found["held", "update"], nan=huge, posinf=huge)
        figures["held"] = np.log(_SETTLED * updates[:, 0] / updates[:, -1])
    return figures


def _jump(speed: np.ndarray, phases: Sequence[int]) -> np.ndarray | None:
    """Return the log of the speed at boundaries over that inside phases; the first turn apart."""
    cuts = np.cumsum(phases)[:-1]  # speed[:, c] is the turn from layer c to c + 1
    inside = np.setdiff1d(np.arange(1, speed.shape[1]), cuts)
    if not len(cuts) or not len(inside):
        return None
    return np.log(speed[:, cuts].mean(axis=1) / speed[:, inside].mean(axis=1))


CLAIMS = [
    Claim("The direction of cls converges", _PAPER,
          "its cosines to the last state lie above those of independent turns of the same sizes",
          above_nulls("cls, direction")),
    Claim("Layers correct a pushed cls token", _PAPER,
          "a small push loses length until the end, after every layer", above_nulls("cls, push")),
    Claim("Layers correct pushed patches", _PAPER, "the same", above_nulls("patches, push")),
    Claim("cls turns sharply late", _PAPER,
          "it turns faster in the last quarter than before, in degrees, the first layer apart",
          above_nulls("cls, late")),
    Claim("Registers are slow, patches between, cls fast", _PAPER,
          "so in degrees, on average after layer 1", above_nulls("order")),
    Claim("Speed jumps where phases meet", _PAPER,
          "the log of the speed there over that inside, for a null at its own max-cut",
          above_nulls("jump")),
    Claim("Updates lose rank late", _PAPER,
          "the log of their effective rank before the last quarter over that in it",
          above_nulls("rank")),
    Claim("Updates of patches align late", _PAPER,
          "their coherence is larger in the last quarter than before", above_nulls("align")),
    Claim("The state settles when the last block is held", _OURS,
          "after 64 more applications its update is a tenth of the first, or less; the null's "
          "block is the mean of its layers", above_nulls("held")),
]  # fmt: skip


def judge_depth(study: dict) -> Judged:
    """Judge all claims for models and nulls."""
    networks = {one["model"]: one["figures"] for one in (*study["models"], *study["nulls"])}
    return judge_networks(CLAIMS, networks, _names(study["nulls"]))


def depth_verdicts(study: dict) -> str:
    """Return the verdicts: a row a claim, a column a model, and in how many nulls it is seen."""
    return claims_table(judge_depth(study), _names(study["nulls"]))


def depth_figures(study: dict) -> str:
    """Return the figures of the first model that decide, beside its nulls: a row a claim."""
    return figures_table(judge_depth(study), study["models"][0]["model"], _names(study["nulls"]))


def claims_page(study: dict) -> str:
    """Return the page of claims in Markdown: a table of verdicts, then the deciding figures."""
    details = claims_details(judge_depth(study), _names(study["models"]))
    return "\n\n".join(["# What we see", depth_verdicts(study), details]) + "\n"


def _names(networks: Sequence[dict]) -> list[str]:
    """Return the names of networks."""
    return [network["model"] for network in networks]

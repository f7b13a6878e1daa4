"""Phase maps of the teachers of a study: how alike their layers are, and where to cut them."""

import numpy as np

from raptor_hf.activations.online import OnlineActivations
from raptor_hf.phases.cuts import phase_contrast

from .atlas_arguments import AtlasArguments
from .maps import phase_map
from .workbench import Bench

_RANDOM_PARTITIONS = 200


def cuts_of(found: dict) -> tuple[dict, dict]:
    """Return the phases and their stability by k, of the first method that finds some.

    Repeated max-cut, the published method, splits no group of fewer than four layers; the best
    runs of layers exist for every k.

    Args:
        found: of `phase_map`.
    """
    phases, stability = {}, {}
    for by_k in found["cuts"].values():
        for k, cut in by_k.items():
            if cut["phases"] and k not in phases:
                phases[k], stability[k] = cut["phases"], cut
    return phases, stability


def map_teacher(bench: Bench, ks: list[int], number: int, sizes: list[int]) -> dict:
    """Return what the layers of a teacher have to do with each other, and what it is.

    Args:
        ks: numbers of phases.
        number: of images, of those that students learn from.
        sizes: other heights and widths of images in pixels to cut at.
    """

    def look(pixels: int | None) -> dict:
        views = bench.views(bench.settings.images.split, number, [pixels] * 2 if pixels else None)
        fewer = {"resamples": 1} if pixels else {}  # of other sizes the phases alone are told
        options = AtlasArguments(num_images=len(views), k=ks, batch_size=64, **fewer)
        description = f"layers at {pixels} px" if pixels else "layers"
        return phase_map(OnlineActivations(bench.teacher, views), options, description=description)

    found = look(None)
    distance = np.array(found["distance"])
    phases, stability = cuts_of(found)
    upper = np.triu_indices(len(distance), 1)
    measured = {
        "distance": found["distance"],
        "similarity": float(1 - distance[upper].mean()),
        "phases": phases,
        "stability": {k: cut for k, cut in stability.items() if int(k) > 1},
        "drop_path_rate": getattr(bench.teacher.config, "drop_path_rate", None),
        "sizes": {str(pixels): cuts_of(look(pixels))[0] for pixels in sizes},
        **bench.describe(),
    }
    if "3" in phases:
        contrast = phase_contrast(distance, phases["3"], draws=_RANDOM_PARTITIONS)
        measured["contrast"] = contrast["contrast"]
    return measured

"""The phase map of a teacher: distances of its layers, cuts, and how its states move.

The atlas keeps a map as one JSON file a teacher. The study makes a map of each of its teachers.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from raptor_hf.activations.online import OnlineActivations, stream_states
from raptor_hf.dynamics.measures import Spread, measure
from raptor_hf.phases.cuts import partition_quality
from raptor_hf.phases.distance import image_distances
from raptor_hf.phases.stability import (
    cut_stability,
    default_methods,
    resampled_distances,
    tidy_distances,
)
from raptor_hf.runs.files import public_name, read_json
from raptor_hf.teachers import teacher_identity

KIND = "phase map"  # value of the key `kind` of such a file
_MEASURES = ("speed", "norm", "update_rank", "convergence")  # of those of `measure`


@dataclass(kw_only=True)
class MapArguments:
    """How many images, which cuts, and how often they are resampled."""

    _argument_group_name = "what is measured"

    num_images: int = field(
        default=500, metadata={"help": "at most, drawn at random; the same ones for all teachers"}
    )
    k: list[int] = field(
        default_factory=lambda: [2, 3, 4, 5, 6],
        metadata={"help": "numbers of phases; those that exceed a teacher's layers are left out"},
    )
    resamples: int = field(
        default=200, metadata={"help": "bootstrap resamples of the images, for the stability"}
    )
    seed: int = field(default=0, metadata={"help": "of the images and resamples"})


def phase_map(
    source: OnlineActivations,
    options: MapArguments,
    *,
    batch_size: int = 16,
    num_workers: int = 0,
    description: str = "phase map",
) -> dict:
    """Measure distances, cuts and motion of a model in one pass over some images.

    Memory holds (L, L) distances of every image, and one batch of states.

    Args:
        source: a model's states of all layers.
        batch_size: images at a time.
        num_workers: processes that read images.
        description: of the progress bar.

    Returns:
        `num_images`, `seed`, `num_tokens`, `num_channels`; `distance` (L, L); `cuts`: by method and
        k, `cut_stability` with the `quality` of `partition_quality`; `speed`, `norm`,
        `convergence` by token group and `update_rank` by kind, each with `mean` and `std` over
        images (`measure`).

    Raises:
        ValueError: states that are not finite.
    """
    # stream the states, and keep sums of the measures and the distances of every image
    spread, distances = Spread(), []
    states = stream_states(
        source,
        description,
        num_images=options.num_images,
        seed=options.seed,
        batch_size=batch_size,
        num_workers=num_workers,
    )
    for batch in states:
        figures = measure(batch, source.layout)
        kept = {key: values for key, values in figures.items() if key[0] in _MEASURES}
        spread.add(kept)
        # one row a token group and image; their mean is the distance of an image
        pairs = image_distances(batch, source.layout)
        distances.append(pairs.unflatten(0, (-1, len(batch))).mean(dim=0).cpu().numpy())
    # cut the mean distances, and those of bootstrap resamples
    of_images = np.concatenate(distances)
    mean = tidy_distances(of_images.mean(axis=0))
    return {
        "num_images": len(of_images),
        "seed": options.seed,
        "num_tokens": batch.shape[2],
        "num_channels": batch.shape[3],
        "distance": mean.tolist(),
        "cuts": find_cuts(mean, of_images, options),
        **spread.summary(),
    }


def find_cuts(
    distance: np.ndarray, of_images: np.ndarray, options: MapArguments
) -> dict[str, dict[str, dict]]:
    """Return the cuts with their stability, by method and k.

    Args:
        distance: (L, L), the mean.
        of_images: (n, L, L).
    """
    resampled = resampled_distances(of_images, options.resamples, seed=options.seed)
    cuts: dict[str, dict[str, dict]] = {}
    for method in default_methods(len(distance)):
        cuts[method] = {}
        for k in sorted({k for k in options.k if k <= len(distance)}):
            cut = cut_stability(distance, resampled, k, method)
            phases = cut["phases"]
            quality = partition_quality(distance, phases) if phases else None
            cuts[method][str(k)] = {**cut, "quality": quality}
    return cuts


def first_cuts(found: dict) -> dict[str, dict]:
    """Return the cut of every k, of the first method that finds one.

    Repeated max-cut, the published method, splits no group of fewer than four layers; the best
    runs of layers exist for every k. The entry `method` says which it was.

    Args:
        found: of `phase_map`.
    """
    first: dict[str, dict] = {}
    for by_k in found["cuts"].values():
        for k, cut in by_k.items():
            if cut["phases"]:
                first.setdefault(k, cut)
    return first


def model_facts(source: OnlineActivations) -> dict:
    """Return the identity and sizes of a model, without a path of this machine."""
    model, layout = source.whole_teacher, source.layout
    identity = teacher_identity(model)
    return {
        "model_type": model.config.model_type,
        "source": public_name(identity["name"]),
        "revision": identity["revision"],
        "weights_sha256": identity["weights_sha256"],
        "num_layers": source.depth,
        "num_parameters": sum(weight.numel() for weight in model.parameters()),
        "image_size": source.resolution,
        "token_groups": {"cls": layout.num_cls, "registers": layout.num_registers},
    }


def file_name(title: str) -> str:
    """Return the letters and digits of a title in lower case, with `_` between them."""
    return re.sub(r"[\W_]+", "_", title.lower()).strip("_")


def load_atlas(folder: str | Path) -> list[dict]:
    """Load the maps of a folder, sorted by name; other JSON files in it are left alone.

    Raises:
        ValueError: two maps of one name.
    """
    maps: dict[str, dict] = {}
    for path in sorted(Path(folder).glob("*.json")):
        content = read_json(path)
        if not isinstance(content, dict) or content.get("kind") != KIND:
            continue
        name = file_name(content["name"])
        if name in maps:
            raise ValueError(
                f"{path}: another phase map of this folder is called {content['name']!r}, too. "
                "Give each its own name."
            )
        maps[name] = content
    return [maps[name] for name in sorted(maps)]

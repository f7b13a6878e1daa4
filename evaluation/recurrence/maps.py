"""The phase map of a teacher: how far apart its layers are, where they are cut, how they move.

One JSON file a teacher, `<name>.json`, holds all that the page shows (`page`). To such a file
others may add the key `"gaps"`, what Raptors of so many phases reach: a list of objects

    {"k": 3, "phases": [7, 3, 2], "stored_parameters": 5400000,
     "units": 40, "r2": {"all": 0.91, …}, "to_spread": {"all": 0.3, …}}

with means over layers by token group: of R², and of ε over the spread of the states; `units` is the
compute of each training. The page draws `r2` over k and shows all of them in a table.
"""

import re
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch

from raptor_hf.activations.online import OnlineActivations, stream_states
from raptor_hf.data import ImageViews, ReadingArguments, list_images
from raptor_hf.data.views import drop_unreadable
from raptor_hf.dynamics.measures import Spread, measure
from raptor_hf.phases.cuts import partition_quality
from raptor_hf.phases.distance import image_distances
from raptor_hf.phases.stability import (
    STABLE_METHODS,
    cut_stability,
    default_methods,
    resampled_distances,
    tidy_distances,
)
from raptor_hf.runs.arguments import named_folders
from raptor_hf.runs.files import public_name, read_json, rounded, write_json
from raptor_hf.runs.folder import environment, finish_run, start_run
from raptor_hf.runs.processes import Interrupted, process_state
from raptor_hf.teachers import load_processor, load_vision_model, teacher_identity

from .atlas_arguments import AtlasArguments

KIND = "phase map"  # what the files of the atlas say that they are
_NEEDED = {
    "name", "model_type", "num_layers", "num_channels", "num_tokens", "num_parameters",
    "image_size", "dataset", "split", "num_images", "weights_sha256", "distance", "cuts", "speed",
    "norm", "variance", "update_rank",
}  # fmt: skip
_KEPT = ("speed", "norm", "update_rank", "convergence")  # of what `measure` finds


class Teacher(NamedTuple):
    """A teacher of the atlas: its file, what readers call it, and where it is."""

    file: str  # without .json
    title: str
    source: str


def named_teachers(values: Iterable[str]) -> list[Teacher]:
    """Return the teachers that a command line names.

    Args:
        values: folders or Hub ids, or `NAME=one of these`. A name may hold anything but `=`; the
            file is called after its letters and digits.

    Raises:
        ValueError: no source or name, or two teachers whose files would have one name.
    """
    teachers = []
    for value in values:
        title, equals, source = value.partition("=")
        if not equals or Path(value).is_dir():
            title, source = public_name(value), value
        teachers.append(Teacher(file_name(title), title.strip(), source))
    named_folders("--teachers", [f"{one.file}={one.source}" for one in teachers])
    return teachers


def file_name(title: str) -> str:
    """Return letters and digits of a title, in small, with `_` for what is between them."""
    return re.sub(r"[\W_]+", "_", title.lower()).strip("_")


def map_teachers(
    teachers: Sequence[Teacher],
    images: datasets.Dataset,
    arguments,
    options: AtlasArguments,
    reading: ReadingArguments,
) -> dict[str, str]:
    """Measure teachers, each as a run of its own: `<file>.json`, and its record in `runs/<file>`.

    One that is finished is left as it is. One that fails is no reason not to go on with the others.

    Args:
        images: of the split that all look at.
        arguments: of the program: `output_dir`, `dataset`, `split`, `resume`.

    Returns:
        Why teachers failed, by their titles.

    Raises:
        ValueError: an unknown method.
    """
    check_methods(options.methods)  # before the first, not of each
    failed = {}
    for number, teacher in enumerate(teachers, 1):
        process_state().print(f"teacher {number} of {len(teachers)}: {teacher.title}", flush=True)
        try:
            _map_teacher(teacher, images, arguments, options, reading)
        except Interrupted:
            raise
        except Exception as error:  # of any library: the model may be anybody's
            if not isinstance(error, ValueError | OSError | ImportError):
                traceback.print_exc()
            failed[teacher.title] = " ".join(f"{error or type(error).__name__}".split())
    return failed


def _map_teacher(
    teacher: Teacher,
    images: datasets.Dataset,
    arguments,
    options: AtlasArguments,
    reading: ReadingArguments,
) -> None:
    """Measure a teacher and write its file, unless that was done before; errors as they come."""
    folder = Path(arguments.output_dir)
    path, record = folder / f"{teacher.file}.json", folder / "runs" / teacher.file
    model = load_vision_model(teacher.source).to(process_state().device)
    processor = load_processor(teacher.source, None, reading.resolution)
    source = OnlineActivations(model, ImageViews(images, processor, reading=reading))
    own = replace(arguments, output_dir=str(record), teachers=[f"{teacher.title}={teacher.source}"])
    listed = list_images(arguments.dataset, images)
    inputs = {"weights": source.identity()}
    done = start_run(own, options, reading, inputs=inputs, images={"images": listed})
    if done and path.exists():
        return
    drop_unreadable(source.images)
    facts = {"kind": KIND, "name": teacher.title, **model_facts(source)}
    facts |= {"dataset": public_name(arguments.dataset), "split": arguments.split}
    facts |= {"images_sha256": listed.content_digest}
    facts |= phase_map(source, options, description=teacher.title)
    write_json(path, rounded({**facts, "environment": environment()}))
    finish_run(record)


def model_facts(source: OnlineActivations) -> dict:
    """Return what a model is, without a path of this machine."""
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
        "token_groups": {
            "cls": layout.num_cls,
            "registers": layout.num_registers,
        },
    }


def phase_map(
    source: OnlineActivations, options: AtlasArguments, *, description: str = "phase map"
) -> dict:
    """Measure distances, cuts and motion of a model in one pass over some images.

    Memory holds (L, L) distances of every image, and one batch of states.

    Args:
        source: a model's states of all layers.
        description: of the progress bar.

    Returns:
        `num_images`, `seed`, `num_tokens`, `num_channels`; `distance` (L, L); `cuts`: by method and
        k, `cut_stability` with the `quality` of `partition_quality`; `speed`, `norm`,
        `convergence` by token group and `update_rank` by kind, each with `mean` and `std` over
        images (`measure`); `variance`: by token group, of layers 0 … L.

    Raises:
        ValueError: states that are not finite, or a method that `cut_stability` refuses.
    """
    spread, moments, distances, shape = _look_at_images(source, options, description)
    mean = tidy_distances(distances.mean(axis=0))
    return {
        "num_images": len(distances),
        "seed": options.seed,
        "num_tokens": shape[2],
        "num_channels": shape[3],
        "distance": mean.tolist(),
        "cuts": find_cuts(mean, distances, options),
        **spread.summary(),
        "variance": {
            name: state_variance(moments, name).tolist() for name in source.layout.groups()
        },
    }


def _look_at_images(
    source: OnlineActivations, options: AtlasArguments, description: str
) -> tuple[Spread, Spread, np.ndarray, torch.Size]:
    """Return figures and moments of the states, distances (n, L, L), and the shape of a batch."""
    spread, moments, distances = Spread(), Spread(), []
    states = stream_states(
        source, description, num_images=options.num_images, seed=options.seed,
        batch_size=options.batch_size, num_workers=options.num_workers,
    )  # fmt: skip
    for batch in states:
        found = measure(batch, source.layout)
        spread.add({key: values for key, values in found.items() if key[0] in _KEPT})
        moments.add(state_moments(batch, source.layout.groups()))
        pairs = image_distances(batch, source.layout)  # a group after another
        distances.append(pairs.unflatten(0, (-1, len(batch))).mean(dim=0).cpu().numpy())
    return spread, moments, np.concatenate(distances), batch.shape


def check_methods(methods: Sequence[str]) -> None:
    """Refuse methods whose cuts have no stability to look at, with a ValueError."""
    if unknown := sorted(set(methods) - set(STABLE_METHODS)):
        raise ValueError(
            f"--methods takes {', '.join(STABLE_METHODS)}; got {', '.join(unknown)}, which do not "
            "look at distances or are unknown."
        )


def find_cuts(
    distance: np.ndarray, of_images: np.ndarray, options: AtlasArguments
) -> dict[str, dict[str, dict]]:
    """Return the cuts with their stability, by method and k.

    Args:
        distance: (L, L), the mean.
        of_images: (n, L, L).
    """
    resampled = resampled_distances(of_images, options.resamples, seed=options.seed)
    cuts: dict[str, dict[str, dict]] = {}
    for method in options.methods or default_methods(len(distance)):
        cuts[method] = {}
        for k in sorted({k for k in options.k if k <= len(distance)}):
            found = cut_stability(distance, resampled, k, method)
            phases = found["phases"]
            quality = partition_quality(distance, phases) if phases else None
            cuts[method][str(k)] = {**found, "quality": quality}
    return cuts


def state_moments(states: torch.Tensor, groups: dict[str, slice]) -> dict[tuple, torch.Tensor]:
    """Return means over a group's tokens of states, (B, L + 1, D), and of their squares,
    (B, L + 1).
    """
    moments: dict[tuple, list[torch.Tensor]] = {}
    for layer in range(states.shape[1]):
        for name, tokens in groups.items():
            part = states[:, layer, tokens].double()  # of all layers at once it takes much memory
            moments.setdefault(("state", name), []).append(part.mean(dim=1))
            moments.setdefault(("square", name), []).append(part.square().mean(dim=(1, 2)))
    return {key: torch.stack(values, dim=1) for key, values in moments.items()}


def state_variance(moments: Spread, group: str) -> np.ndarray:
    """Return the variance of states of a token group, (L + 1,), as `state_variances` defines it."""
    of_means = np.square(moments.mean("state", group)).mean(axis=-1)
    return np.maximum(moments.mean("square", group) - of_means, 0)  # rounding falls below 0


def load_atlas(folder: str | Path) -> list[dict]:
    """Load the maps of a folder, sorted by name; other JSON files in it are left alone.

    Raises:
        ValueError: a map that lacks something, or two of one name.
    """
    maps: dict[str, dict] = {}
    for path in sorted(Path(folder).glob("*.json")):
        content = read_json(path)
        if not isinstance(content, dict) or content.get("kind") != KIND:
            continue
        if missing := sorted(_NEEDED - set(content)):
            raise ValueError(
                f"{path} is a phase map that lacks {', '.join(missing)}. Delete it, and let "
                "evaluation.recurrence.atlas make it again."
            )
        if file_name(content["name"]) in maps:
            raise ValueError(
                f"{path}: another phase map of this folder is called {content['name']!r}, too. "
                "Give each its own name."
            )
        maps[file_name(content["name"])] = content
    return [maps[name] for name in sorted(maps)]

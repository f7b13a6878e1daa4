"""Phases of a teacher against nulls: networks and similarities that have no phases to find.

    python -m evaluation.recurrence.nulls --teacher outputs/digits/teacher --dataset digits \
        --split test --output_dir outputs/digits/nulls

Measures the teacher, Raptors of it, and null networks: the teacher untrained, and with its layers
in random order. Writes nulls.json, nulls.md with the tables, and two figures. A network that is
measured is kept in raw/, where `--resume` finds it.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path

import numpy as np
import torch

from evaluation.recurrence.nulls_page import draw_nulls, nulls_page
from evaluation.verdicts import Estimate
from raptor_hf import dynamics
from raptor_hf.configuration_raptor import TokenLayout
from raptor_hf.data import ImageViews, batches, list_images, load_images
from raptor_hf.data.arguments import ReadingArguments
from raptor_hf.dynamics.measures import directions
from raptor_hf.dynamics.nulls import null_networks, r2_baselines
from raptor_hf.dynamics.systems import DepthSystem
from raptor_hf.metrics import RSquared, compute_over_processes, state_statistics
from raptor_hf.phases.nulls import compare_with_turns, matched_means
from raptor_hf.phases.similarity import MEASURES, half_samples
from raptor_hf.runs.arguments import named_folders, parse_arguments
from raptor_hf.runs.files import folder_digest, public_name, read_json, rounded, write_json
from raptor_hf.runs.folder import environment, finish_run, start_run
from raptor_hf.runs.processes import run_program

_BATCH_SIZE = 8
_R2_IMAGES = 100  # their states are held
_NULL_IMAGES = 250  # at most, for the similarities of the nulls


@dataclass(kw_only=True)
class Arguments:
    """Which teacher, which images, and where the results go."""

    _argument_group_name = "inputs and outputs"

    teacher: str = field(metadata={"help": "folder or Hub id"})
    raptors: list[str] = field(
        default_factory=list, metadata={"help": "its Raptors: folders, Hub ids or NAME=FOLDER"}
    )
    dataset: str = field(metadata={"help": "digits, an image folder or a Hub id"})
    split: str = field(default="test", metadata={"help": "of the images"})
    output_dir: str = field(metadata={"help": "folder of nulls.json, nulls.md and figures"})
    num_images: int = field(default=1000, metadata={"help": "at most, for the similarities"})
    num_runs: int = field(
        default=100, metadata={"help": "of these, for swaps of layers; 0: phases alone"}
    )
    seed: int = field(default=0, metadata={"help": "of images, networks and halves"})
    num_workers: int = field(default=0, metadata={"help": "processes that read images"})
    resume: bool = field(default=False, metadata={"help": "go on after a run that was cut off"})
    quick: bool = field(default=False, metadata={"help": "few images and draws, to try it out"})
    # null networks of each kind, and halves of the images for the intervals
    nulls: int = field(default=5, init=False)
    draws: int = field(default=100, init=False)

    def __post_init__(self):
        if self.quick:
            self.num_images, self.num_runs, self.nulls, self.draws = 60, 16, 2, 10


def pooled_states(states: Iterable[torch.Tensor], layout: TokenLayout) -> dict[str, np.ndarray]:
    """Return one vector an image and layer 1 … L of cls and of patches, (n, L, D) each."""
    pooled: dict[str, list] = {}
    for batch in states:
        for name in ("cls", "patches"):
            if name in layout.groups():
                vectors = batch[:, 1:, layout.groups()[name]].double().mean(dim=2)
                pooled.setdefault(name, []).append(vectors.cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in pooled.items()}


def all_swaps(system: DepthSystem, images: Iterable[Mapping]) -> np.ndarray:
    """Replace every layer of a teacher by every other one (paper, Fig. 15).

    Returns:
        (n, L, L): the cosine of the last states with layer i (row) replaced by j and without, mean
        over the tokens of cls or, where there is none, of the patches.
    """
    groups, layers, matrices = system.layout.groups(), system.depth, []
    tokens = groups.get("cls", groups["patches"])
    for batch in images:
        states = system.trajectory(batch)
        untouched = directions(states[:, -1, tokens])
        matrix = torch.ones(len(states), layers, layers, dtype=torch.double)
        for i, j in permutations(range(1, layers + 1), 2):
            # run on from the layer that is replaced
            last = system.run(states[:, i - 1], start=i - 1, swapped={i: j})[:, -1, tokens]
            cosines = (directions(last) * untouched).sum(dim=-1)
            matrix[:, i - 1, j - 1] = cosines.mean(dim=-1)
        matrices.append(matrix)
    return torch.cat(matrices).numpy()


def raw_figures(
    system: DepthSystem,
    images: ImageViews,
    rows: np.ndarray,
    few: Sequence[Mapping],
    own: Arguments,
) -> dict[str, np.ndarray]:
    """Measure a network, or read what was measured before the run was cut off.

    Returns:
        Figures of single images: `pooled_states`, and `all_swaps` of a network with layers.
    """
    path = Path(own.output_dir) / "raw" / f"{system.name}.npz"
    if not path.exists():
        reader = batches(images, _BATCH_SIZE, system.name, rows=rows, num_workers=own.num_workers)
        raw = pooled_states(map(system.trajectory, reader), system.layout)
        if few and not system.is_raptor:
            raw["swaps"] = all_swaps(system, few)
        # whole or not at all
        path.parent.mkdir(exist_ok=True)
        with open(temporary := path.with_suffix(".tmp"), "wb") as file:
            np.savez(file, **raw)
        os.replace(temporary, path)
    return dict(np.load(path))


def describe(raw: Mapping[str, np.ndarray], own: Arguments) -> dict:
    """Return what raw figures say of a network.

    Returns:
        `phases`, of `compare_with_turns` by measure; `swaps`, means (L, L); `figures` of claims, as
        `Estimate`: how layers gather by every measure and k, and what swaps gain within phases, at
        equal |i − j|.
    """
    pooled, result = {name: raw[name] for name in ("cls", "patches") if name in raw}, {"phases": {}}
    figures = result["figures"] = {}
    for measure in MEASURES:
        found = compare_with_turns(pooled, measure, draws=own.draws, seed=own.seed)
        result["phases"][measure] = found
        figures |= gathering(measure, found["all"]["cuts"], len(pooled["patches"]))
    if "swaps" in raw:
        number = len(raw["swaps"])
        halves = [np.arange(number), *half_samples(number, own.draws, seed=own.seed)]
        means = [raw["swaps"][half].mean(axis=0) for half in halves]
        result["swaps"] = means[0].tolist()
        for k, cut in result["phases"]["raw cosine"]["all"]["cuts"].items():
            pairs = [matched_means(mean, cut["phases"]["maxcut"]) for mean in means]
            gain, *gains = [within - across for within, across in pairs]
            figures[f"swaps, k = {k}"] = Estimate(gain, float(np.std(gains)), number - 1)
    # no pairs of layers, no figure
    result["figures"] = {name: one for name, one in figures.items() if np.isfinite(one.mean)}
    return result


def gathering(measure: str, cuts: dict, num_images: int) -> dict[str, Estimate]:
    """Return the two figures of every cut that say whether layers gather in phases."""
    return {
        f"{measure}, k = {k}: {name}": Estimate(*cut[name], num_images - 1)
        for k, cut in cuts.items()
        for name in ("within", "contrast")
    }


def measure_fit(
    teacher: DepthSystem, raptors: Sequence[DepthSystem], images: Sequence[Mapping]
) -> dict:
    """Return R² on half of the images: of baselines fitted to the other half, and of Raptors."""
    half = (len(images) + 1) // 2
    fitted, judged = (
        torch.cat([teacher.trajectory(batch).cpu() for batch in part])
        for part in (images[:half], images[half:])
    )
    scores = r2_baselines(fitted, judged, teacher.layout)
    for raptor in raptors:
        own = torch.cat([raptor.trajectory(batch).cpu() for batch in images[half:]])
        rows = state_statistics(prediction=own, target=judged, groups=teacher.layout.groups())
        scores[raptor.name] = compute_over_processes(RSquared, [rows])
    return scores


def study_nulls(systems: list[DepthSystem], images: ImageViews, own: Arguments) -> dict:
    """Measure the teacher, its Raptors and its nulls on the same images."""
    teacher, *raptors = systems
    rows = np.random.default_rng(own.seed).permutation(len(images.image_ids))[: own.num_images]
    # nulls take fewer images: their values count, not their intervals
    num_few = (own.num_runs * teacher.can_run_on, (own.num_runs + 3) // 4)
    few, fewer = (list(batches(images, _BATCH_SIZE, None, rows=rows[:n])) for n in num_few)
    networks, nulls = {}, []
    for system in systems:
        networks[system.name] = describe(raw_figures(system, images, rows, few, own), own)
    for system in null_networks(teacher, own.nulls, seed=own.seed):
        raw = raw_figures(system, images, rows[:_NULL_IMAGES], fewer, own)
        networks[system.name] = describe(raw, own)
        del networks[system.name]["phases"]  # no page shows them
        nulls.append(system.name)
    held = list(batches(images, _BATCH_SIZE, None, rows=rows[:_R2_IMAGES]))
    return {
        "num_images": len(rows),
        "num_runs": sum(len(batch["image_id"]) for batch in few),
        "teacher": teacher.name,
        "nulls": nulls,
        "r2": measure_fit(teacher, raptors, held),
        "networks": networks,
    }


def main(argv: list[str] | None = None) -> None:
    """Load the models, measure them and their nulls, write the results."""
    own, reading = parse_arguments(Arguments, ReadingArguments, argv=argv)
    models = [own.teacher, *own.raptors]
    folders = [path for path in named_folders("--raptors", models).values() if Path(path).is_dir()]

    # a run is its arguments, its models and its images
    images = load_images(own.dataset, own.split, reading)
    listed = {"images": list_images(own.dataset, images)}
    inputs = {public_name(folder): folder_digest(folder) for folder in folders}
    if start_run(own, reading, inputs=inputs, images=listed):
        return
    systems, views = dynamics.load_inputs(models, images, reading)
    result = study_nulls(systems, views, own)

    # write
    folder = Path(own.output_dir)
    about = {"dataset": public_name(own.dataset), "split": own.split}
    write_json(folder / "nulls.json", rounded({**about, **result, "environment": environment()}, 4))
    result = read_json(folder / "nulls.json")
    (folder / "nulls.md").write_text(nulls_page(result), encoding="utf-8")
    for name, figure in draw_nulls(result):
        figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
    finish_run(own.output_dir)
    print(f"tables:  {folder / 'nulls.md'}\nfigures: {folder / 'nulls.json'}")


if __name__ == "__main__":
    run_program(main, alone=True)

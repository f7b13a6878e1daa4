"""Phases of a teacher against nulls: networks and similarities that have no phases to find.

    python -m evaluation.recurrence.nulls --teacher outputs/digits/teacher --dataset digits \
        --split test --output_dir outputs/digits/nulls

Measures the teacher, Raptors of it, itself untrained and with its layers in random order. Writes
nulls.json, nulls.md with the tables, and three figures. A network that is measured is kept in raw/,
where `--resume` finds it. The digits take two minutes of one core, a DINOv2-S with 1,000
photographs and `--num_runs 24` an hour.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path

import numpy as np
import torch

from evaluation.recurrence.nulls_page import draw_nulls, nulls_page
from raptor_hf import dynamics
from raptor_hf.configuration_raptor import TokenLayout
from raptor_hf.data import ImageViews, batches, list_images, load_images
from raptor_hf.data.arguments import ReadingArguments
from raptor_hf.dynamics.interventions import layer_swap
from raptor_hf.dynamics.nulls import null_networks, r2_baselines
from raptor_hf.dynamics.systems import DepthSystem
from raptor_hf.dynamics.tangents import push_growth
from raptor_hf.metrics import RSquared, compute_over_processes, state_statistics
from raptor_hf.phases.nulls import compare_with_turns, matched_means, with_interval
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
        default=100, metadata={"help": "of these, for swaps and tangents; 0: phases alone"}
    )
    seed: int = field(default=0, metadata={"help": "of images, networks, tangents and halves"})
    num_workers: int = field(default=0, metadata={"help": "processes that read images"})
    resume: bool = field(default=False, metadata={"help": "go on after a run that was cut off"})
    quick: bool = field(default=False, metadata={"help": "few images and draws, to try it out"})
    # null networks of each kind, and halves of the images for the intervals
    untrained: int = field(default=2, init=False)
    shuffled: int = field(default=4, init=False)
    draws: int = field(default=100, init=False)

    def __post_init__(self):
        if self.quick:
            self.num_images, self.num_runs, self.draws = 60, 16, 10
            self.untrained = self.shuffled = 1


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
    """Replace every layer by every other one.

    Returns:
        (n, L, L): the cosine of the last states with layer i (row) replaced by j and without.
    """
    layers, columns = system.depth, []
    swaps = [{i: j} for i, j in permutations(range(1, layers + 1), 2)]
    for batch in images:
        columns.append(layer_swap(system, system.trajectory(batch), swaps)["cosine"].cpu().numpy())
    matrices = np.ones((sum(map(len, columns)), layers, layers))
    matrices[:, ~np.eye(layers, dtype=bool)] = np.concatenate(columns)
    return matrices


def all_pushes(system: DepthSystem, images: Iterable[Mapping], seed: int) -> dict[str, np.ndarray]:
    """Carry tangents on from four depths: `<figure>/<group>/<start>` of `push_growth`."""
    figures: dict[str, list] = {}
    for batch in images:
        found = push_growth(system, system.trajectory(batch), batch, seed=seed)
        for (group, start, name), values in found.items():
            figures.setdefault(f"{name}/{group}/{start}", []).append(values.cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in figures.items()}


def raw_figures(
    system: DepthSystem,
    images: ImageViews,
    rows: np.ndarray,
    few: Sequence[Mapping],
    own: Arguments,
) -> dict[str, np.ndarray]:
    """Measure a network, or read what was measured before the run was cut off.

    Returns:
        Figures of single images: `pooled_states`, `swaps` of a network with layers, `all_pushes`.
    """
    path = Path(own.output_dir) / "raw" / f"{system.name}.npz"
    if not path.exists():
        reader = batches(images, _BATCH_SIZE, system.name, rows=rows, num_workers=own.num_workers)
        raw = pooled_states(map(system.trajectory, reader), system.layout)
        if few and not system.is_raptor:
            raw["swaps"] = all_swaps(system, few)
        raw |= all_pushes(system, few, own.seed)
        # whole or not at all
        path.parent.mkdir(exist_ok=True)
        with open(temporary := path.with_suffix(".tmp"), "wb") as file:
            np.savez(file, **raw)
        os.replace(temporary, path)
    return dict(np.load(path))


def judge_network(raw: Mapping[str, np.ndarray], own: Arguments) -> dict:
    """Return what raw figures say of a network.

    Returns:
        `phases`, of `compare_with_turns` by measure; with swaps and pushes, their means `swaps`,
        (L, L), and `growth`; `figures`, with intervals, that answer questions at several places: by
        measure and k how layers gather; by k what `swaps` gain within phases, at equal |i − j|; by
        token group and layer minus the log of how much longer a push gets (`lost`).
    """
    # phases
    pooled, result = {name: raw[name] for name in ("cls", "patches") if name in raw}, {"phases": {}}
    figures = result["figures"] = {}
    for measure in MEASURES:
        found = compare_with_turns(pooled, measure, draws=own.draws, seed=own.seed)
        result["phases"][measure], cuts = found, found["all"]["cuts"]
        figures[measure] = {f"k = {k}": gathering(cut) for k, cut in cuts.items()}

    # swaps
    if "swaps" in raw:
        halves = half_samples(len(raw["swaps"]), own.draws, seed=own.seed)
        means = [raw["swaps"].mean(axis=0), *(raw["swaps"][half].mean(axis=0) for half in halves)]
        result["swaps"], figures["swaps"] = means[0].tolist(), {}
        for k, cut in result["phases"]["raw cosine"]["all"]["cuts"].items():
            pairs = [matched_means(mean, cut["phases"]["maxcut"]) for mean in means]
            first, *others = [within - across for within, across in pairs]
            figures["swaps"][f"k = {k}"] = {"gain": with_interval(first, others)}

    # pushes
    for name in [name for name in raw if name.startswith("angle/")]:
        _, group, start = name.split("/")
        curves = {one: raw[f"{one}/{group}/{start}"] for one in ("growth", "angle", "norms_alone")}
        means = {one: values.mean(axis=0).tolist() for one, values in curves.items()}
        result.setdefault("growth", {}).setdefault(group, {})[start] = means
        lost = -np.log(curves["angle"][:, -1] / curves["norms_alone"][:, -1])
        halves = half_samples(len(lost), own.draws, seed=own.seed)
        lost = with_interval(float(lost.mean()), [lost[half].mean() for half in halves])
        figures.setdefault(group, {})[f"after layer {start}"] = {"lost": lost}
    return result


def gathering(cut: dict) -> dict:
    """Return copies of the two figures of a cut that say whether layers gather in phases."""
    return {name: dict(cut[name]) for name in ("within", "contrast")}


def put_nulls_beside(figures: dict, nulls: Sequence[dict]) -> None:
    """Put `null` beside every figure: the largest value that other networks reach at any place.

    So of any number of null networks one at most can stand above the others.
    """
    for question, places in figures.items():
        others = [place for null in nulls for place in null.get(question, {}).values()]
        for place in places.values():
            for name, figure in place.items():
                values = [other[name]["value"] for other in others]
                figure["null"] = max((v for v in values if not np.isnan(v)), default=None)


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
    networks = {}
    for system in systems:
        networks[system.name] = judge_network(raw_figures(system, images, rows, few, own), own)
    kinds = {"num_untrained": own.untrained, "num_shuffled": own.shuffled}
    for system in null_networks(teacher, **kinds, seed=own.seed):
        raw = raw_figures(system, images, rows[:_NULL_IMAGES], fewer, own)
        networks[system.name] = judge_network(raw, own)
    nulls = [name for name in networks if name not in [system.name for system in systems]]
    for name, network in networks.items():
        others = [networks[null]["figures"] for null in nulls if null != name]
        put_nulls_beside(network["figures"], others)
        if name in nulls:  # no page shows more of their phases
            both = [(measure, found["all"]["cuts"]) for measure, found in network["phases"].items()]
            network["phases"] = {measure: {"all": {"cuts": cuts}} for measure, cuts in both}

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
    images, models = load_images(own.dataset, own.split, reading), [own.teacher, *own.raptors]
    listed, inputs = {"images": list_images(own.dataset, images)}, {}
    for folder in named_folders("--raptors", models).values():
        if Path(folder).is_dir():
            inputs[public_name(folder)] = folder_digest(folder)
    if start_run(own, reading, inputs=inputs, images=listed):
        return
    systems, views = dynamics.load_inputs(
        models, own.dataset, split=own.split, reading=reading, dataset=images
    )
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

"""Phases of a teacher against nulls: networks and similarities that have no phases to find.

    python -m evaluation.recurrence.nulls --teacher outputs/digits/teacher --dataset digits \
        --split test --output_dir outputs/digits/nulls

Writes nulls.json, nulls.md with the tables, and three figures. `--raptors` measures Raptors of this
teacher beside it. On one core the digits take three minutes, a DINOv2-S and 1,000 photographs 15.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from evaluation.claims import all_of, by_interval
from evaluation.dynamics.study import partition_name
from evaluation.recurrence.nulls_page import draw_nulls, nulls_page
from raptor_hf import dynamics
from raptor_hf.data import ImageViews, batches, list_images, load_images
from raptor_hf.data.arguments import ReadingArguments
from raptor_hf.dynamics.interventions import layer_swap
from raptor_hf.dynamics.nulls import r2_baselines, shuffle_layers, untrained
from raptor_hf.dynamics.systems import DepthSystem
from raptor_hf.dynamics.tangents import tangent_growth
from raptor_hf.metrics import RSquared, compute_over_processes, state_statistics
from raptor_hf.phases import find_phases, nulls
from raptor_hf.phases.similarity import MEASURES, half_samples
from raptor_hf.runs.arguments import parse_arguments
from raptor_hf.runs.files import folder_digest, public_name, rounded, write_json
from raptor_hf.runs.folder import environment, finish_run, start_run
from raptor_hf.runs.processes import run_program

KS = (2, 3, 4)
_WIDTH = 2.4  # standard errors: 95 % for the three k together (Bonferroni)
_SMALLEST = 0.01  # contrast of a phase; less is the chance of one network's weights
_BATCH_SIZE = 8


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
        default=100, metadata={"help": "of these, for swaps, tangents and R², which take longer"}
    )
    seed: int = field(default=0, metadata={"help": "of images, networks, tangents and halves"})
    num_workers: int = field(default=0, metadata={"help": "processes that read images"})
    resume: bool = field(default=False, metadata={"help": "leave a finished run as it is"})
    quick: bool = field(default=False, metadata={"help": "few images and draws, to try it out"})
    # networks with layers in random order, and halves of the images for the intervals
    shuffles: int = field(default=3, init=False)
    draws: int = field(default=100, init=False)

    def __post_init__(self):
        if self.quick:
            self.num_images, self.num_runs, self.shuffles, self.draws = 60, 16, 1, 10


def null_networks(teacher: DepthSystem, shuffles: int, seed: int) -> list[DepthSystem]:
    """Return the teacher untrained, and with its layers in random orders; without its head."""
    networks = [replace(teacher, name="untrained", model=untrained(teacher.model, seed), head=None)]
    for draw in range(1, shuffles + 1):
        model = shuffle_layers(teacher.model, seed + draw)
        networks.append(replace(teacher, name=f"shuffled {draw}", model=model, head=None))
    return networks


def pooled_states(
    system: DepthSystem, images: Iterator[Mapping[str, torch.Tensor]]
) -> dict[str, np.ndarray]:
    """Return one vector an image and layer 1 … L of cls and of patches, (n, L, D) each."""
    groups, pooled = system.layout.groups(), {}
    for batch in images:
        states = system.trajectory(batch)[:, 1:]
        for name in ("cls", "patches"):
            if name in groups:
                vectors = states[:, :, groups[name]].mean(dim=2).double().cpu().numpy()
                pooled.setdefault(name, []).append(vectors)
    return {name: np.concatenate(parts) for name, parts in pooled.items()}


def with_interval(whole: float, halves: Sequence[float]) -> dict:
    """Return a figure and its interval, from the spread of the figures of halves of the images."""
    error = _WIDTH * float(np.std(halves))
    return {"value": whole, "low": whole - error, "high": whole + error}


def judge_phases(three: np.ndarray, halves: np.ndarray, k: int, seed: int) -> dict:
    """Cut a similarity into k phases, and compare it with turns that have no phases.

    Args:
        three: (3, L, L), of `nulls.beside_turns`.
        halves: (draws, 3, L, L), of halves of the images.
        k: number of phases.
        seed: of turns in random order.

    Returns:
        `phases`, and those of independent turns; `cut_share`, beside it the `shares` of independent
        and straight turns and the 5, 50 and 95 % quantiles over turns in `random_order`; `within`
        and `contrast` of `nulls.beyond_turns`; `seen`: the first above 0, the second above .01,
        which untrained networks do not reach by the chance of their weights.
    """
    similarity, independent, straight = three
    phases = find_phases(1 - similarity, k, "maxcut")
    orders = nulls.reordered_turns(np.diagonal(similarity, 1), len(halves), seed=seed)
    reordered = [nulls.best_cut_share(1 - order, k) for order in orders]
    share = nulls.best_cut_share(1 - similarity, k)
    found = {
        "phases": phases,
        "independent_turns": find_phases(1 - independent, k, "maxcut"),
        "cut_share": with_interval(share, [nulls.best_cut_share(1 - h[0], k) for h in halves]),
        "shares": {
            "independent": nulls.best_cut_share(1 - independent, k),
            "straight": nulls.best_cut_share(1 - straight, k),
            "random_order": np.quantile(reordered, [0.05, 0.5, 0.95]).tolist(),
        },
    }
    beyond, answers = nulls.beyond_turns(similarity, independent, phases), []
    of_halves = [nulls.beyond_turns(*half[:2], phases) for half in halves]
    for name, value in beyond.items():
        found[name] = with_interval(value, [half[name] for half in of_halves])
        smallest = _SMALLEST if name == "contrast" else 0
        answers.append(by_interval(found[name]["low"] - smallest, found[name]["high"]))
    return {**found, "seen": all_of(answers)}


def measure_phases(
    pooled: Mapping[str, np.ndarray], measure: str, draws: int, seed: int
) -> dict[str, dict]:
    """Measure a similarity (`MEASURES`) and judge its phases, by tokens.

    `all` is the mean over the token groups, as the paper takes it.
    """
    stacks, result = {}, {}
    for tokens, vectors in pooled.items():
        parts = [vectors]
        parts += [vectors[half] for half in half_samples(len(vectors), draws, seed=seed)]
        stacks[tokens] = np.stack([nulls.beside_turns(MEASURES[measure](part)) for part in parts])
    stacks["all"] = np.mean(list(stacks.values()), axis=0)
    for tokens, (whole, *halves) in stacks.items():
        cuts = {str(k): judge_phases(whole, np.stack(halves), k, seed) for k in KS}
        similarity, independent, _ = whole.tolist()
        result[tokens] = {
            "similarity": similarity,
            "independent_turns": independent,
            "cuts": cuts,
        }
    return result


def measure_swaps(
    system: DepthSystem,
    images: Iterator[Mapping[str, torch.Tensor]],
    partitions: Sequence[list[int]],
    draws: int,
    seed: int,
) -> dict:
    """Replace every layer by every other one, and compare pairs within phases with pairs across.

    Returns:
        `cosine`, (L, L): of the last state with layer i (row) replaced by j and without; `gains`: a
        partition each, the mean within its phases less that across at equal |i − j|.
    """
    layers = system.depth
    pairs = [(i, j) for i in range(layers) for j in range(layers) if i != j]
    swaps, columns = [{i + 1: j + 1} for i, j in pairs], []
    for batch in images:
        columns.append(layer_swap(system, system.trajectory(batch), swaps)["cosine"].cpu().numpy())
    cosines = np.concatenate(columns)
    matrices = np.ones((len(cosines), layers, layers))
    first, second = np.transpose(pairs)
    matrices[:, first, second] = cosines

    def gain(matrix: np.ndarray, phases: list[int]) -> float:
        within, across = nulls.matched_means(matrix, phases)
        return within - across

    whole, gains = matrices.mean(axis=0), {}
    halves = [matrices[h].mean(axis=0) for h in half_samples(len(matrices), draws, seed=seed)]
    for phases in partitions:
        interval = with_interval(gain(whole, phases), [gain(half, phases) for half in halves])
        gains[partition_name(phases)] = interval
    return {"cosine": whole.tolist(), "gains": gains}


def measure_growth(
    system: DepthSystem, images: Iterator[Mapping[str, torch.Tensor]], draws: int, seed: int
) -> dict:
    """Carry tangents through the layers from four depths on, see `tangent_growth`.

    Returns:
        By group and start the means over images of its figures, and `in_length`: the log of the
        factor by which the pushed tokens' part of the tangent has grown in the end.
    """
    starts = sorted({quarter * system.depth // 4 for quarter in range(4)})
    rows: dict = {}
    for batch in images:
        states = system.trajectory(batch)
        for group in [name for name in ("cls", "patches") if name in system.layout.groups()]:
            for start in starts:
                figures = tangent_growth(system, states, batch, group=group, start=start, seed=seed)
                rows.setdefault((group, str(start)), []).append(figures)
    growth: dict = {}
    for (group, start), parts in rows.items():
        merged = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
        last = (merged["angle"][:, -1] / merged["norms_alone"][:, -1]).log().double().numpy()
        figures = {name: values.mean(dim=0).tolist() for name, values in merged.items()}
        halves = [last[half].mean() for half in half_samples(len(last), draws, seed=seed)]
        figures["in_length"] = with_interval(float(last.mean()), halves)
        growth.setdefault(group, {})[start] = figures
    return growth


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
    few = list(batches(images, _BATCH_SIZE, None, rows=rows[: own.num_runs]))
    networks = {}
    for system in [*systems, *null_networks(teacher, own.shuffles, own.seed)]:
        everything = batches(
            images, _BATCH_SIZE, system.name, rows=rows, num_workers=own.num_workers
        )
        pooled, phases = pooled_states(system, everything), {}
        for measure in MEASURES:
            phases[measure] = measure_phases(pooled, measure, own.draws, own.seed)
        # swaps and tangents take long: a quarter of their images for the nulls
        some = few if system in systems else few[: (len(few) + 3) // 4]
        result = {"phases": phases, "growth": measure_growth(system, some, own.draws, own.seed)}
        if not system.is_raptor:
            cuts = phases["raw cosine"]["all"]["cuts"].values()
            partitions = [cut["phases"] for cut in cuts]
            result["swaps"] = measure_swaps(system, some, partitions, own.draws, own.seed)
        networks[system.name] = result
    return {
        "num_images": len(rows),
        "num_runs": sum(len(batch["label"]) for batch in few),
        "teacher": teacher.name,
        "r2": measure_fit(teacher, raptors, few),
        "networks": networks,
    }


def main(argv: list[str] | None = None) -> None:
    """Load the models, measure them and their nulls, write the results."""
    own, reading = parse_arguments(Arguments, ReadingArguments, argv=argv)
    images, models = load_images(own.dataset, own.split, reading), [own.teacher, *own.raptors]
    listed, inputs = {"images": list_images(own.dataset, images)}, {}
    for source in models:
        folder = source.rpartition("=")[2]
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
    result = rounded({**about, **result, "environment": environment()}, 4)
    write_json(folder / "nulls.json", result)
    (folder / "nulls.md").write_text(nulls_page(result), encoding="utf-8")
    for name, figure in draw_nulls(result):
        figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
    finish_run(own.output_dir)
    print(f"tables:  {folder / 'nulls.md'}\nfigures: {folder / 'nulls.json'}")


if __name__ == "__main__":
    run_program(main, alone=True)

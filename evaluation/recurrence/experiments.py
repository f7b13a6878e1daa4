"""The experiments of a study: lists of students with their labels, and their results.

Students that several experiments have are trained once. `collect` adds the results to the labels.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from raptor_hf.activations.online import OnlineActivations, stream_states
from raptor_hf.dynamics.nulls import r2_baselines
from raptor_hf.phases import find_phases
from raptor_hf.phases.cuts import default_methods
from raptor_hf.phases.distance import layer_distance
from raptor_hf.runs.files import public_name, read_json, rounded, write_json
from raptor_hf.runs.folder import environment

from .measures import figures_of_r2
from .students import Student, runs_of, shuffled
from .workbench import Bench, Settings, record_file, student_key, train_students

TEACHER = "teacher"  # name of the study's own teacher
_MAP_IMAGES = 500  # of those that students learn from, to find phases
_FLOOR_IMAGES = 100
_COMPARED = (2, 3, 4)  # numbers of blocks of partitions


class Row(NamedTuple):
    """A student of an experiment.

    Args:
        label: what it is, for tables and figures.
        teacher: the name of its teacher.
        student: its phases, and how it learns.
    """

    label: dict
    teacher: str
    student: Student


def gap(maps: dict, ks: list[int], seeds: int) -> list[Row]:
    """How close are k blocks to the teacher? Phases by max-cut."""
    phases, rows = maps[TEACHER]["phases"], []
    for k in ks:
        for seed in range(seeds):
            rows.append(Row({"k": k}, TEACHER, Student(runs_of(phases[str(k)]), seed)))
    return rows


def partitions(maps: dict, ks: list[int], seeds: int) -> list[Row]:
    """Does it matter where depth is cut?

    At k = 2 all cuts, of the study's teacher and of its other seeds, a student each: `cut`. Of the
    study's teacher at k = 2, 3, 4 max-cut, uniform, random and shuffled partitions. Random ones are
    other runs of two layers at least, shuffled ones are of max-cut's sizes; both are drawn anew
    with every seed.
    """
    own, rows = maps[TEACHER], []
    for name, found in maps.items():
        if 2 in ks and (name == TEACHER or name.startswith("seed_")):
            layers = found["num_layers"]
            for first in range(1, layers):
                student = Student(runs_of([first, layers - first]))
                rows.append(Row({"teacher": name, "k": 2, "partition": "cut"}, name, student))
    for k in [k for k in ks if k in _COMPARED]:
        best = own["phases"][str(k)]
        for seed in range(seeds):
            parts = {
                "max-cut": runs_of(best),
                "uniform": runs_of(find_phases(own["distance"], k, "uniform")),
                "random": runs_of(_other_runs(own["distance"], best, seed)),
                "shuffled": shuffled(best, seed),
            }
            for kind, layers in parts.items():
                label = {"teacher": TEACHER, "k": k, "partition": kind}
                rows.append(Row(label, TEACHER, Student(layers, seed)))
    return rows


def _other_runs(distance: list, phases: list[int], seed: int) -> list[int]:
    """Draw a partition into as many runs of two layers at least that is not the one given."""
    shortest = min(2, *phases)
    for draw in range(1000):
        runs = find_phases(distance, len(phases), "random", seed=1000 * seed + draw)
        if runs != phases and min(runs) >= shortest:
            return runs
    raise ValueError(f"There is no other partition of {sum(phases)} layers than {phases}.")


def training(maps: dict, ks: list[int], seeds: int) -> list[Row]:
    """When does block recurrence arise? Teachers of other drop rates, seeds and lengths.

    Each gets one Raptor of three blocks, cut at its own phases: the teacher is what is repeated.
    """
    rows = []
    for name, found in maps.items():
        rows.append(Row({"teacher": name}, name, Student(runs_of(found["phases"]["3"]))))
    return rows


EXPERIMENTS: dict[str, Callable[[dict, list[int], int], list[Row]]] = {
    "gap": gap,
    "partitions": partitions,
    "training": training,
}


def collect(rows: list[Row], folder: str | Path) -> list[dict]:
    """Return the results of rows from the record in a folder, each after its label."""
    results = []
    for row in rows:
        result = read_json(record_file(folder, row.teacher, row.student))
        for name in student_key(row.teacher, row.student):
            del result[name]
        label = {**row.label, "seed": row.student.seed, "parts": row.student.parts}
        results.append({**label, **result})
    return results


def run_study(
    settings: Settings,
    teachers: dict[str, str],
    experiments: Sequence[str],
    folder: Path,
    *,
    ks: list[int],
    seeds: int,
) -> None:
    """Measure the teachers, train the students of all experiments, write a JSON each.

    What is on the disk is not made again: `maps.json` and the record of students.

    Args:
        teachers: folders or Hub ids by name; the study's own is `teacher`.
        experiments: names of `EXPERIMENTS`.
        folder: for `maps.json` and `<experiment>.json`.
        ks: numbers of blocks.
        seeds: of every student.
    """
    # measure
    path = folder / "maps.json"
    maps = read_json(path)["maps"] if path.exists() else {}
    for name in teachers:
        if name in maps:
            continue
        bench = Bench(settings, teachers[name])
        maps[name] = rounded(map_teacher(bench, sorted({*ks, 3})))
        about = {
            "dataset": public_name(settings.images.dataset),
            "num_images": len(bench.states),
            "image_size": list(bench.system.image_size),
            "teacher": public_name(teachers[TEACHER]),
            "units": settings.units,
            "environment": environment(),
        }
        write_json(path, {"about": about, "maps": maps})

    # train, and write what each experiment asks for
    rows, students = {}, []
    for name in experiments:
        rows[name] = EXPERIMENTS[name](maps, ks, seeds)
        students += [(row.teacher, row.student) for row in rows[name]]
    train_students(settings, teachers, students, folder)
    for name, own in rows.items():
        write_json(folder / f"{name}.json", {"rows": rounded(collect(own, folder), 5)})


def map_teacher(bench: Bench, ks: list[int]) -> dict:
    """Measure the layer distances of a teacher, and cut them into phases.

    Phases are those of repeated max-cut, the published method, where it finds k, else those of
    exact max-cut over runs of layers. `similarity` is the mean cosine of two different layers,
    `floor` the R² of a_0 plus the mean update of each position, which looks at no layer: the mean
    over the layers of all tokens and of patches, the median of cls.
    """
    split, model = bench.settings.images.split, bench.system.model
    source = OnlineActivations(model, bench.views(split, _MAP_IMAGES))
    distance = layer_distance(stream_states(source, "layers"), bench.system.layout)
    fitted = OnlineActivations(model, bench.views(split, _FLOOR_IMAGES))
    fitted = torch.cat(list(stream_states(fitted, None)))
    floor = r2_baselines(fitted, bench.states, bench.system.layout)["a_0 + mean update"]
    phases = {str(k): _cut(distance, k) for k in ks}
    return {
        "distance": distance.tolist(),
        "similarity": float(1 - distance[np.triu_indices(len(distance), 1)].mean()),
        "floor": figures_of_r2(floor),
        "phases": phases,
        "drop_path_rate": getattr(bench.system.model.config, "drop_path_rate", None),
        "num_layers": bench.system.depth,
    }


def _cut(distance: np.ndarray, k: int) -> list[int]:
    """Return the k phases of the first method that finds them."""
    with suppress(ValueError):
        return find_phases(distance, k, default_methods(len(distance))[0])
    return find_phases(distance, k, "maxcut")

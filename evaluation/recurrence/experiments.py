"""The experiments of a study: lists of students with their labels, and their results.

Students that several experiments have are trained once. `collect` adds the results to the labels.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from raptor_hf.activations.online import OnlineActivations
from raptor_hf.phases import find_phases
from raptor_hf.phases.cuts import phase_contrast
from raptor_hf.runs.files import public_name, read_json, rounded, write_json
from raptor_hf.runs.folder import environment

from .maps import MapArguments, first_cuts, phase_map
from .students import Student, runs_of, shuffled
from .workbench import Bench, Settings, record_file, student_key, train_students

TEACHER = "teacher"  # name of the study's own teacher
_RANDOM_PARTITIONS = 200


class Row(NamedTuple):
    """A student of an experiment.

    Args:
        label: what it is, for tables and figures.
        teacher: the name of its teacher.
    """

    label: dict
    teacher: str
    student: Student


class Plan(NamedTuple):
    """How much is trained.

    Args:
        ks: numbers of blocks of the experiment `gap`.
        partition_ks: of `partitions`.
        seeds: of `gap` and `partitions`.
        other_seeds: of the others.
    """

    ks: list[int]
    partition_ks: list[int]
    seeds: int
    other_seeds: int

    @property
    def cuts(self) -> list[int]:
        """Numbers of phases that teachers are cut into; `training` compares them at three."""
        return sorted({*self.ks, *self.partition_ks, 3})


def gap(phase_maps: dict, plan: Plan) -> list[Row]:
    """How close are k blocks to the teacher? Phases by max-cut, k = 1 … 6."""
    phases, rows = phase_maps[TEACHER]["phases"], []
    for k in plan.ks:
        for seed in range(plan.seeds):
            rows.append(Row({"k": k}, TEACHER, Student(runs_of(phases[str(k)]), seed)))
    return rows


def partitions(phase_maps: dict, plan: Plan) -> list[Row]:
    """Does it matter where depth is cut? Max-cut, uniform, random and shuffled partitions.

    Random ones are other runs of layers, shuffled ones are of max-cut's sizes; both are drawn anew
    with every seed.
    """
    own, rows = phase_maps[TEACHER], []
    for k in plan.partition_ks:
        best = own["phases"][str(k)]
        for seed in range(plan.seeds):
            parts = {
                "max-cut": runs_of(best),
                "uniform": runs_of(find_phases(own["distance"], k, "uniform")),
                "random": runs_of(_other_runs(own["distance"], best, seed)),
                "shuffled": shuffled(best, seed),
            }
            for kind, layers in parts.items():
                label = {"k": k, "partition": kind}
                rows.append(Row(label, TEACHER, Student(layers, seed)))
    return rows


def _other_runs(distance: list, phases: list[int], seed: int) -> list[int]:
    """Draw a partition into as many runs that is not the one given."""
    for draw in range(1000):
        runs = find_phases(distance, len(phases), "random", seed=1000 * seed + draw)
        if runs != phases:
            return runs
    raise ValueError(f"There is no other partition of {sum(phases)} layers than {phases}.")


def alternatives(phase_maps: dict, plan: Plan) -> list[Row]:
    """What else could the same bytes, or the same compute, buy?

    Against a plain Raptor of k blocks: uniform phases; plain ViTs of few layers of their own, and
    the same Raptor, both taught by the last state alone. The compute of the training
    is the same for all.
    """
    own, rows = phase_maps[TEACHER], []
    ks = [k for k in plan.ks if str(k) in own["phases"]]
    for seed in range(plan.other_seeds):
        students = {}
        for k in ks:
            parts = runs_of(own["phases"][str(k)])
            even = runs_of(find_phases(own["distance"], k, "uniform"))
            students["Raptor", k] = Student(parts, seed)
            if k in (1, *plan.partition_ks):
                students["few layers, last state", k] = Student(even, seed, untied=True)
            if k in plan.partition_ks:
                students["uniform phases", k] = Student(even, seed)
                students["Raptor, last state", k] = Student(parts, seed, learned="last")
        for (name, k), student in students.items():
            rows.append(Row({"k": k, "kind": name}, TEACHER, student))
    return rows


def training(phase_maps: dict, plan: Plan) -> list[Row]:
    """When does block recurrence arise? Teachers at other drop rates, and at other times.

    Each gets Raptors of three blocks, or of as many as it has phases, cut at its own phases.
    """
    rows = []
    for name, found in phase_maps.items():
        k = str(min(3, max(map(int, found["phases"]))))
        parts = runs_of(found["phases"][k])
        for seed in range(plan.other_seeds):
            rows.append(Row({"teacher": name}, name, Student(parts, seed)))
    return rows


EXPERIMENTS: dict[str, Callable[[dict, Plan], list[Row]]] = {
    "gap": gap,
    "partitions": partitions,
    "alternatives": alternatives,
    "training": training,
}


def collect(rows: list[Row], folder: str | Path) -> list[dict]:
    """Return the results of rows from the record in a folder, each after its label."""
    results = []
    for row in rows:
        result = read_json(record_file(folder, row.teacher, row.student))
        for name in student_key(row.teacher, row.student):
            del result[name]
        label = {**row.label, "seed": row.student.seed, "untied": row.student.untied}
        parts = [list(part) for part in row.student.parts]
        results.append({**label, "parts": parts, **result})
    return results


def run_study(
    settings: Settings,
    plan: Plan,
    teachers: dict[str, str],
    experiments: Sequence[str],
    folder: Path,
    *,
    map_images: int,
    map_sizes: list[int],
    processes: int,
) -> None:
    """Measure the teachers, train the students of all experiments, write a JSON each.

    What is on the disk is not made again: `maps.json` and the record of students.

    Args:
        teachers: folders or Hub ids by name; the study's own is `teacher`.
        experiments: names of `EXPERIMENTS`.
        folder: for `maps.json` and `<experiment>.json`.
        map_images, map_sizes: see `map_teacher`.
        processes: students that are trained at the same time.
    """
    maps = _measure_teachers(settings, plan, teachers, folder, map_images, map_sizes)
    rows, students = {}, []
    for name in experiments:
        rows[name] = EXPERIMENTS[name](maps, plan)
        students += [(row.teacher, row.student) for row in rows[name]]
    train_students(settings, teachers, students, folder, processes=processes)
    for name, own in rows.items():
        write_json(folder / f"{name}.json", {"rows": rounded(collect(own, folder), 5)})


def _measure_teachers(
    settings: Settings,
    plan: Plan,
    teachers: dict[str, str],
    folder: Path,
    number: int,
    sizes: list[int],
) -> dict:
    """Return the phase map of every teacher; `maps.json` keeps them."""
    path = folder / "maps.json"
    maps = read_json(path)["maps"] if path.exists() else {}
    for name, source in teachers.items():
        if name in maps:
            continue
        bench = Bench(settings, source)
        measured = map_teacher(bench, plan.cuts, number, sizes if name == TEACHER else [])
        maps[name] = rounded(measured)
        about = {
            "dataset": public_name(settings.images.dataset),
            "num_images": len(bench.states),
            "image_size": list(bench.system.image_size),
            "teacher": public_name(teachers[TEACHER]),
            "units": settings.units,
            "environment": environment(),
        }
        write_json(path, {"about": about, "maps": maps})
    return maps


def map_teacher(bench: Bench, ks: list[int], number: int, sizes: list[int]) -> dict:
    """Measure the layer distances of a teacher, its phases, and its own accuracy and sizes.

    Args:
        bench: the teacher.
        ks: numbers of phases.
        number: of images, of those that students learn from.
        sizes: other heights and widths of images in pixels, for which the phases alone are kept.
    """

    def look(pixels: int | None, resamples: int) -> tuple[dict, dict]:
        """Return the map at a size, and its cuts by k."""
        resolution = None if pixels is None else [pixels] * 2
        views = bench.views(bench.settings.images.split, number, resolution)
        source = OnlineActivations(bench.system.model, views)
        options = MapArguments(num_images=len(views), k=ks, resamples=resamples)
        description = "layers" if pixels is None else f"layers at {pixels} px"
        found = phase_map(source, options, batch_size=64, description=description)
        return found, first_cuts(found)

    # at the size of the training: distances, phases and their stability
    found, cuts = look(None, MapArguments.resamples)
    distance = np.array(found["distance"])
    phases = {k: cut["phases"] for k, cut in cuts.items()}
    upper = np.triu_indices(len(distance), 1)
    measured = {
        "distance": found["distance"],
        "similarity": float(1 - distance[upper].mean()),
        "phases": phases,
        "stability": {k: cut for k, cut in cuts.items() if int(k) > 1},
        "drop_path_rate": getattr(bench.system.model.config, "drop_path_rate", None),
        "sizes": {},
        **bench.describe(),
    }
    # at other sizes the phases alone
    for pixels in sizes:
        _, other = look(pixels, 1)
        measured["sizes"][str(pixels)] = {k: cut["phases"] for k, cut in other.items()}
    if "3" in phases:
        contrast = phase_contrast(distance, phases["3"], draws=_RANDOM_PARTITIONS)
        measured["contrast"] = contrast["contrast"]
    return measured

"""The experiments of a study: which students each trains, and what it makes of them.

An experiment is a list of rows, each a student under what it is called; students that several
experiments have are trained once. `collect` lays the results beside the rows.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from raptor_hf.distillation.compute import UNIT_IMAGES, application_flops, teacher_layer
from raptor_hf.dry_runs import describe
from raptor_hf.phases import find_phases
from raptor_hf.runs.files import public_name, read_json, rounded, write_json
from raptor_hf.runs.folder import environment

from .students import Student, runs_of, shuffled
from .teacher_maps import cuts_of, map_teacher
from .workbench import Bench, Settings, facts_of, recorded, train_students

TEACHER = "teacher"  # what the study's own teacher is called


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
    phases = phase_maps[TEACHER]["phases"]
    return [
        Row({"k": k}, TEACHER, Student(runs_of(phases[str(k)]), seed))
        for k in plan.ks
        for seed in range(plan.seeds)
    ]


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
            rows += [
                Row({"k": k, "partition": kind}, TEACHER, Student(layers, seed))
                for kind, layers in parts.items()
            ]
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
        rows += [Row({"k": k, "kind": name}, TEACHER, s) for (name, k), s in students.items()]
    return rows


def training(phase_maps: dict, plan: Plan) -> list[Row]:
    """When does block recurrence arise? Teachers at other drop rates, and at other times.

    Each gets Raptors of three blocks, or of as many as it has phases, cut at its own phases.
    """
    rows = []
    for name, found in phase_maps.items():
        k = str(min(3, max(map(int, found["phases"]))))
        parts = runs_of(found["phases"][k])
        rows += [
            Row({"teacher": name}, name, Student(parts, seed)) for seed in range(plan.other_seeds)
        ]
    return rows


EXPERIMENTS: dict[str, Callable[[dict, Plan], list[Row]]] = {
    "gap": gap,
    "partitions": partitions,
    "alternatives": alternatives,
    "training": training,
}


def collect(rows: list[Row], record: list[dict]) -> list[dict]:
    """Return the results of rows: the label, seed and phases beside what was measured."""
    found = []
    for row in rows:
        facts = facts_of(row.teacher, row.student)
        result = next(run for run in record if facts.items() <= run.items())
        measured = {name: value for name, value in result.items() if name not in facts}
        parts = [list(part) for part in row.student.parts]
        label = {**row.label, "seed": row.student.seed, "untied": row.student.untied}
        found.append({**label, "parts": parts, **measured})
    return found


def print_plan(
    settings: Settings, plan: Plan, teachers: dict[str, str], experiments: Sequence[str]
) -> None:
    """Print what a study would train, from the teacher's configuration alone.

    Where its phases are is not known yet: students are counted with equal ones.
    """
    source = settings.source
    facts = describe.teacher_facts(source.teacher, source.revision, settings.reading.resolution)
    depth = facts.config.num_hidden_layers
    even = np.zeros((depth, depth))
    phases = {str(k): find_phases(even, k, "uniform") for k in plan.cuts if k <= depth}
    maps = {name: {"distance": even, "phases": phases} for name in teachers}
    rows = {name: EXPERIMENTS[name](maps, plan) for name in experiments}
    number = len({(row.teacher, row.student) for own in rows.values() for row in own})
    layer = application_flops(teacher_layer(facts.config), facts.num_tokens)
    flop = number * settings.units * 3 * UNIT_IMAGES * depth * layer
    lines = [("teacher", describe.describe_teacher(source.teacher, facts))]
    lines += [("", f"{name}: {folder}") for name, folder in teachers.items() if name != TEACHER]
    lines += [("students", f"{name}: {len(own)}") for name, own in rows.items()]
    lines += [
        ("", f"{number:,} in all, as some are the same: {describe.cost(flop)}"),
        ("writes", f"{settings.loop.output_dir}: a JSON an experiment, figures, study.md"),
    ]
    describe.print_plan("Study block recurrence", lines)


def add_gaps(path: Path, settings: Settings, *, processes: int) -> None:
    """Write what short distillations reach, for every k that a map has, into the map of a teacher.

    Args:
        path: of a map of the atlas; it gets the key `gaps` (`evaluation.recurrence.maps`).
        settings: whose output folder keeps the record of students.
        processes: students that are trained at the same time.
    """
    found, folder = read_json(path), Path(settings.loop.output_dir)
    phases = {"1": [found["num_layers"]], **cuts_of(found)[0]}
    rows = [
        Row({"k": int(k), "phases": lengths}, TEACHER, Student(runs_of(lengths)))
        for k, lengths in phases.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    students = [(row.teacher, row.student) for row in rows]
    teachers = {TEACHER: settings.source.teacher}
    train_students(settings, teachers, students, folder, processes=processes)
    found["gaps"] = [
        {
            **{name: reached[name] for name in ("k", "phases", "stored_parameters")},
            "units": settings.units,
            "r2": reached["r2"]["mean"],
            "to_spread": {n: sum(gap) / len(gap) for n, gap in reached["to_spread"].items()},
        }
        for reached in rounded(collect(rows, recorded(folder)), 5)
    ]
    write_json(path, found)


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
    rows = {name: EXPERIMENTS[name](maps, plan) for name in experiments}
    students = [(row.teacher, row.student) for name in experiments for row in rows[name]]
    train_students(settings, teachers, students, folder, processes=processes)
    record = recorded(folder)
    for name, own in rows.items():
        write_json(folder / f"{name}.json", {"rows": rounded(collect(own, record), 5)})


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
        maps[name] = rounded(
            map_teacher(bench, plan.cuts, number, sizes if name == TEACHER else [])
        )
        about = {
            "dataset": public_name(settings.images.dataset),
            "num_images": len(bench.held_out.states),
            "image_size": list(bench.held_out.image_size),
            "teacher": public_name(teachers[TEACHER]),
            "units": settings.units,
            "environment": environment(),
        }
        write_json(path, {"about": about, "maps": maps})
    return maps

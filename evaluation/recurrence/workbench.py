"""Train and judge the students of a study, each once.

All have the same images, objective, optimiser and batches, and the same compute of the training,
which decides the number of steps.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import set_seed

from evaluation.compute import step_units
from evaluation.recurrence.workers import (
    in_processes,
    mend_record,
    quietly,
    read_record,
    write_entries,
)
from raptor_hf.activations.arguments import ActivationArguments, ImageArguments
from raptor_hf.activations.online import Activations, OnlineActivations, open_source, stream_states
from raptor_hf.configuration_raptor import token_layout
from raptor_hf.data import ImageViews, ReadingArguments, choose_images, load_images
from raptor_hf.data.arguments import CropArguments
from raptor_hf.data.views import drop_unreadable
from raptor_hf.distillation.arguments import (
    ObjectiveArguments,
    ValidationArguments,
    parse_token_weights,
)
from raptor_hf.distillation.fidelity import teacher_head
from raptor_hf.distillation.rollout import Chain
from raptor_hf.distillation.training import train_chains
from raptor_hf.dynamics.systems import DepthSystem
from raptor_hf.loop import configure_compute
from raptor_hf.loop.arguments import ComputeArguments, LoopArguments
from raptor_hf.runs.processes import process_state, progress_bar
from raptor_hf.teachers import load_backbone, load_processor

from .measures import measure_gap, state_sizes
from .students import Student, make_spans, student_sizes

RECORD = "students.jsonl"
_WARMUP = 0.1  # of the steps


class Settings(NamedTuple):
    """The arguments that all students of a study have in common.

    Attributes:
        source: the teacher, and its stored states or `online`; other teachers compute theirs.
        units: compute of each training, see `step_units`.
    """

    source: ActivationArguments
    images: ImageArguments
    crops: CropArguments
    reading: ReadingArguments
    objective: ObjectiveArguments
    compute: ComputeArguments
    loop: LoopArguments
    validation: ValidationArguments
    units: float


class Bench:
    """A teacher, its head, and its states on the held-out images.

    Args:
        settings: of the study.
        name: folder or Hub id of the teacher.
    """

    def __init__(self, settings: Settings, name: str):
        own, validation = name == settings.source.teacher, settings.validation
        self.settings, self.name = settings, name
        self.source = settings.source
        if not own:
            self.source = replace(self.source, teacher=name, activations="online", revision=None)
        teacher = load_backbone(name, self.source.revision).to(process_state().device)
        # states that students are judged on, (n, L + 1, N, D), and the classes of their images
        views = self.views(validation.validation_split, validation.validation_images)
        online = OnlineActivations(teacher, views)
        self.states = torch.cat(list(stream_states(online, None)))
        self.labels = views.labels[views.image_ids].to(self.states.device)
        head = teacher_head(teacher, validation.validation_head if own else None, views.classes)
        self.system = DepthSystem(
            name,
            teacher,
            token_layout(teacher.config),
            None if head is None else head.to(teacher.device),
            tuple(online.resolution),
        )

    def open_learned(self, layers: Sequence[int]) -> Activations:
        """Open the states of some layers, to learn from."""
        images, crops = ImageArguments(), CropArguments()
        if self.source.online:
            images, crops = self.settings.images, self.settings.crops
        reading = self.settings.reading
        return open_source(self.source, images, crops, reading, self.system.model, list(layers))

    def views(self, split: str, number: int, resolution: list[int] | None = None) -> ImageViews:
        """Open images as they are: at most so many, chosen at random; 0: all."""
        reading = self.settings.reading
        if resolution is not None:
            reading = replace(reading, resolution=resolution)
        images = load_images(self.settings.images.dataset, split, reading)
        views = ImageViews(
            images,
            load_processor(self.name, self.source.revision, reading.resolution),
            image_ids=choose_images(len(images), min(number or len(images), len(images)), 0),
            reading=reading,
        )
        return drop_unreadable(views)

    def accuracy(self, last: torch.Tensor) -> float | None:
        """Return the accuracy of the teacher's head on states (n, N, D); None without a head."""
        if self.system.head is None:
            return None
        return float((self.system.predict(last) == self.labels).double().mean())

    def describe(self) -> dict:
        """Return accuracy and sizes of the teacher itself, on the held-out images."""
        return {
            "num_layers": self.system.depth,
            "accuracy": self.accuracy(self.states[:, -1]),
            "parameters": self.system.model.num_parameters(),
            **state_sizes(self.states[:, 1:], self.system.layout),
        }

    def train(self, student: Student) -> dict:
        """Train a student and judge it: `measure_gap`, `student_sizes`, accuracy, steps."""
        settings, teacher = self.settings, self.system.model
        set_seed(student.seed)
        model, spans = make_spans(teacher, student)
        configure_compute(model, settings.compute)
        learned = "last" if student.untied else student.learned
        objective = replace(settings.objective, layers_learned=learned)

        # the compute decides the number of steps
        num_tokens = self.states.shape[-2]
        applications = student.num_applications
        cost = step_units(
            objective, settings.loop, model.config, num_tokens, num_applications=applications
        )
        steps = max(1, round(settings.units / cost))

        # train, without a checkpoint: a student takes seconds, and is on record when it is done
        with tempfile.TemporaryDirectory() as folder:
            loop = replace(
                settings.loop, output_dir=folder, seed=student.seed, steps=steps, report_to="none",
                warmup_steps=max(1, round(_WARMUP * steps)), log_every=steps, checkpoint_every=0,
            )  # fmt: skip
            chain = Chain(spans, parse_token_weights(objective.token_weights))
            states = self.open_learned(student.layers)
            new_views = self.source.online and settings.images.views == 0
            train_chains([chain], teacher, states, objective, loop, new_views=new_views)

        # judge
        model.to(teacher.device)
        held_out = self.states[:, student.layers]
        gap, last = measure_gap(spans, teacher, held_out, self.system.image_size)
        sizes = student_sizes(model, applications, num_tokens)
        return {**gap, **sizes, "accuracy": self.accuracy(last), "steps": steps}


_benches: dict[str, Bench] = {}  # of this process


def _train(settings: Settings, teacher: str, student: Student, threads: int) -> dict:
    """Train a student silently, in a process that keeps its teachers."""
    torch.set_num_threads(threads)
    with quietly():
        if teacher not in _benches:
            _benches[teacher] = Bench(settings, teacher)
        return _benches[teacher].train(student)


def student_key(teacher: str, student: Student) -> dict:
    """Return the entries by which a line of the record is found."""
    return json.loads(json.dumps({"teacher": teacher, **asdict(student)}))


def recorded(folder: str | Path) -> list[dict]:
    """Return all students on record in a folder."""
    return read_record(Path(folder) / RECORD)


def train_students(
    settings: Settings,
    teachers: dict[str, str],
    students: Sequence[tuple[str, Student]],
    folder: str | Path,
    *,
    processes: int,
) -> None:
    """Train the students that are not on record, several at once; each is recorded when done.

    Args:
        settings: of the study.
        teachers: folders or Hub ids by name.
        students: each with the name of its teacher.
        folder: of the record.
        processes: students that are trained at the same time.
    """
    path, done, missing = Path(folder) / RECORD, recorded(folder), {}
    threads = max(1, (os.cpu_count() or 1) // processes)
    for name, student in dict.fromkeys(students):
        key = student_key(name, student)
        if not any(key.items() <= run.items() for run in done):
            missing[name, student] = (settings, teachers[name], student, threads)
    mend_record(path)
    total = len(set(students))
    bar = progress_bar("students", total, unit="student", initial=total - len(missing))
    with bar:
        for task, result in in_processes(_train, missing, processes):
            write_entries(path, [{**student_key(*task), **result}])
            bar.update()

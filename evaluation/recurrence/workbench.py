"""Where the students of a study learn and are judged: teachers, their images, one training each.

The same for all students of a study: images, objective, optimiser, batches, and the compute of the
training, which decides the number of steps. A student that is on record is not trained again.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import set_seed

from raptor_hf.activations.arguments import ActivationArguments, ImageArguments
from raptor_hf.activations.online import Activations, OnlineActivations, open_source, stream_states
from raptor_hf.configuration_raptor import TokenLayout, token_layout
from raptor_hf.data import (
    ImageViews,
    ReadingArguments,
    choose_images,
    load_images,
)
from raptor_hf.data.arguments import CropArguments
from raptor_hf.data.views import drop_unreadable
from raptor_hf.distillation.arguments import (
    ObjectiveArguments,
    ValidationArguments,
    parse_token_weights,
)
from raptor_hf.distillation.compute import step_units
from raptor_hf.distillation.fidelity import teacher_head
from raptor_hf.distillation.rollout import Chain
from raptor_hf.distillation.training import train_chains
from raptor_hf.loop import configure_compute
from raptor_hf.loop.arguments import ComputeArguments, LoopArguments
from raptor_hf.runs.processes import process_state, progress_bar
from raptor_hf.runs.workers import in_processes, mend_record, quietly, read_record, write_entries
from raptor_hf.teachers import load_backbone, load_processor

from .gap import judge_classes, measure_gap, state_sizes
from .students import Student, make_spans, student_sizes

RECORD = "students.jsonl"
_WARMUP = 0.1  # of the steps


class Settings(NamedTuple):
    """What all students of a study have in common; the arguments of the program.

    Args:
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


def default_settings(
    teacher: str,
    dataset: str,
    splits: tuple[str, str],
    reading: ReadingArguments,
    units: float,
    folder: str | Path,
) -> Settings:
    """Return settings for any teacher and images: what suited a real DINOv2 (docs/recipes.md).

    Args:
        splits: to learn from, and to judge on.
        folder: for the record.
    """
    return Settings(
        ActivationArguments(teacher=teacher, activations="online"),
        ImageArguments(dataset=dataset, split=splits[0]),
        CropArguments(),
        reading,
        ObjectiveArguments(
            objective="autoregressive", normalize="group", token_weights="0.05,0.05,0.90"
        ),
        ComputeArguments(),
        LoopArguments(output_dir=str(folder), optimizer="muon", learning_rate=3e-3, batch_size=64),
        ValidationArguments(
            validation_dataset=dataset, validation_split=splits[1], validation_images=512
        ),
        units,
    )


@dataclass
class HeldOut:
    """States that students are judged on: (n, L + 1, N, D), and the classes of their images."""

    states: torch.Tensor
    labels: torch.Tensor
    image_size: tuple[int, int]


class Bench:
    """A teacher with all that its students need.

    Args:
        name: folder or Hub id of the teacher.
    """

    def __init__(self, settings: Settings, name: str):
        own = name == settings.source.teacher
        self.settings, self.name = settings, name
        self.source = replace(
            settings.source, teacher=name,
            activations=settings.source.activations if own else "online",
            revision=settings.source.revision if own else None,
        )  # fmt: skip
        self.teacher = load_backbone(name, self.source.revision).to(process_state().device)
        self.held_out, self.head = self._open_held_out()

    @property
    def layout(self) -> TokenLayout:
        """Token layout of the states."""
        return token_layout(self.teacher.config)

    def learned(self, layers: Sequence[int]) -> Activations:
        """Open the states of some layers, to learn from."""
        settings = self.settings
        images = settings.images if self.source.online else ImageArguments()
        crops = settings.crops if self.source.online else CropArguments()
        return open_source(self.source, images, crops, settings.reading, self.teacher, list(layers))

    def views(self, split: str, number: int, resolution: list[int] | None = None) -> ImageViews:
        """Open images as they are: at most so many, chosen at random; 0: all."""
        reading = self.settings.reading
        resolution = reading.resolution if resolution is None else resolution
        images = load_images(self.settings.images.dataset, split, reading)
        views = ImageViews(
            images,
            load_processor(self.name, self.source.revision, resolution),
            image_ids=choose_images(len(images), min(number or len(images), len(images)), 0),
            reading=replace(reading, resolution=resolution),
        )
        return drop_unreadable(views)

    def _open_held_out(self) -> tuple[HeldOut, nn.Linear | None]:
        """Let the teacher compute the states that students are judged on; find its head."""
        validation = self.settings.validation
        views = self.views(validation.validation_split, validation.validation_images)
        source = OnlineActivations(self.teacher, views)
        states = torch.cat(list(stream_states(source, None)))
        labels = views.labels[views.image_ids]
        given = validation.validation_head if self.name == self.settings.source.teacher else None
        head = teacher_head(self.teacher, given, views.classes)
        head = None if head is None else head.to(states.device)
        return HeldOut(states, labels, tuple(source.resolution)), head

    def accuracy(self, last: torch.Tensor) -> float | None:
        """Return the accuracy of the teacher's head on states (n, N, D); None without a head."""
        if self.head is None:
            return None
        return judge_classes(self.teacher, self.head, last, self.held_out.labels)

    def describe(self) -> dict:
        """Return what is known of the teacher itself, on the held-out images."""
        return {
            "num_layers": self.teacher.config.num_hidden_layers,
            "accuracy": self.accuracy(self.held_out.states[:, -1]),
            "parameters": self.teacher.num_parameters(),
            **state_sizes(self.held_out.states[:, 1:], self.layout),
        }

    def train(self, student: Student) -> dict:
        """Train a student and judge it: `measure_gap`, `student_sizes`, accuracy, steps."""
        settings = self.settings
        set_seed(student.seed)
        model, spans = make_spans(self.teacher, student)
        configure_compute(model, settings.compute)
        objective = replace(
            settings.objective, layers_learned="last" if student.untied else student.learned
        )
        num_tokens = self.held_out.states.shape[-2]
        cost = step_units(
            objective, settings.loop, model.config, num_tokens,
            num_applications=student.num_applications,
        )  # fmt: skip
        steps = max(1, round(settings.units / cost))
        with tempfile.TemporaryDirectory() as folder:
            loop = replace(
                settings.loop, output_dir=folder, seed=student.seed, steps=steps, report_to="none",
                warmup_steps=max(1, round(_WARMUP * steps)), log_every=steps, checkpoint_every=0,
            )  # fmt: skip
            chain = Chain(spans, parse_token_weights(objective.token_weights))
            learned = self.learned(student.layers)
            new_views = self.source.online and settings.images.views == 0
            train_chains([chain], self.teacher, learned, objective, loop, new_views=new_views)
        model.to(self.teacher.device)
        states = self.held_out.states[:, student.layers]
        gap, last = measure_gap(spans, self.teacher, states, self.held_out.image_size)
        sizes = student_sizes(model, student.num_applications, num_tokens)
        return {**gap, **sizes, "accuracy": self.accuracy(last), "steps": steps}


_benches: dict[str, Bench] = {}  # of this process


def _train(settings: Settings, teacher: str, student: Student, threads: int) -> dict:
    """Train a student in a process that keeps its teachers, and says nothing."""
    torch.set_num_threads(threads)
    with quietly():
        if teacher not in _benches:
            _benches[teacher] = Bench(settings, teacher)
        return _benches[teacher].train(student)


def facts_of(teacher: str, student: Student) -> dict:
    """Return what a line of the record is found by."""
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
    """Train what is not on record, several at once; each is on record when it is trained.

    Args:
        teachers: folders or Hub ids by name.
        students: each with the name of its teacher.
        folder: of the record.
    """
    path, known, missing = Path(folder) / RECORD, recorded(folder), {}
    threads = max(1, (os.cpu_count() or 1) // processes)
    for name, student in dict.fromkeys(students):
        facts = facts_of(name, student)
        if not any(facts.items() <= run.items() for run in known):
            missing[name, student] = (settings, teachers[name], student, threads)
    mend_record(path)
    total = len(set(students))
    bar = progress_bar("students", total, unit="student", initial=total - len(missing))
    with bar:
        for task, result in in_processes(_train, missing, processes):
            write_entries(path, [{**facts_of(*task), **result}])
            bar.update()

"""Train and judge the students of a study, each once.

All have the same images, objective, optimiser and batches, and the same compute of the training,
which decides the number of steps.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import set_seed

from evaluation.compute import step_units
from raptor_hf.activations.arguments import ActivationArguments, ImageArguments
from raptor_hf.activations.online import Activations, OnlineActivations, open_source, stream_states
from raptor_hf.configuration_raptor import token_layout
from raptor_hf.data import ImageViews, ReadingArguments, choose_images, load_images
from raptor_hf.data.arguments import CropArguments
from raptor_hf.distillation.arguments import (
    ObjectiveArguments,
    ValidationArguments,
    parse_token_weights,
)
from raptor_hf.distillation.compute import application_flops
from raptor_hf.distillation.rollout import Chain
from raptor_hf.distillation.training import train_chains
from raptor_hf.dynamics.systems import DepthSystem
from raptor_hf.loop import configure_compute
from raptor_hf.loop.arguments import ComputeArguments, LoopArguments
from raptor_hf.runs.files import write_json
from raptor_hf.runs.processes import Interrupted, process_state, progress_bar
from raptor_hf.teachers import load_backbone, load_processor

from .measures import measure_gap
from .students import Student, make_spans

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
    validation: ValidationArguments
    loop: LoopArguments
    units: float


class Bench:
    """A teacher, and its states on the held-out images.

    Args:
        settings: of the study.
        name: folder or Hub id of the teacher.
    """

    def __init__(self, settings: Settings, name: str):
        own, validation = name == settings.source.teacher, settings.validation
        self.settings, self.name = settings, name
        self.source = settings.source
        if not own:
            self.source = replace(self.source, teacher=name, activations="online")
        teacher = load_backbone(name).to(process_state().device)
        # states that students are judged on, (n, L + 1, N, D)
        views = self.views(validation.validation_split, validation.validation_images)
        online = OnlineActivations(teacher, views)
        self.states = torch.cat(list(stream_states(online, None)))
        layout = token_layout(teacher.config)
        self.system = DepthSystem(name, teacher, layout, image_size=tuple(online.resolution))

    def open_learned(self) -> Activations:
        """Open the states of all layers, to learn from."""
        images, crops = ImageArguments(), CropArguments()
        if self.source.online:
            images, crops = self.settings.images, self.settings.crops
        reading, layers = self.settings.reading, list(range(self.system.depth + 1))
        return open_source(self.source, images, crops, reading, self.system.model, layers)

    def views(self, split: str, number: int) -> ImageViews:
        """Open images as they are: at most so many, chosen at random; 0: all."""
        reading = self.settings.reading
        images = load_images(self.settings.images.dataset, split, reading)
        return ImageViews(
            images,
            load_processor(self.name, reading.resolution),
            image_ids=choose_images(len(images), min(number or len(images), len(images)), 0),
            reading=reading,
        )

    def train(self, student: Student) -> dict:
        """Train a student and judge it: `measure_gap`, steps, and its costs.

        Costs are `stored_parameters`, and `multiply_adds` of an image, without embeddings and norm.
        """
        settings, teacher = self.settings, self.system.model
        set_seed(student.seed)
        model, spans = make_spans(teacher, student)
        configure_compute(model, settings.compute)
        objective = settings.objective

        # the compute decides the number of steps
        num_tokens = self.states.shape[-2]
        cost = step_units(objective, settings.loop, model.config, num_tokens)
        steps = max(1, round(settings.units / cost))

        # train, without a checkpoint: a student takes seconds, and is on record when it is done
        with tempfile.TemporaryDirectory() as folder:
            loop = replace(
                settings.loop, output_dir=folder, seed=student.seed, steps=steps, report_to="none",
                warmup_steps=max(1, round(_WARMUP * steps)), log_every=steps, checkpoint_every=0,
            )  # fmt: skip
            chain = Chain(spans, parse_token_weights(objective.token_weights))
            states = self.open_learned()
            new_views = self.source.online and settings.images.views == 0
            try:
                train_chains([chain], teacher, states, objective, loop, new_views=new_views)
            except Interrupted as stop:  # its state goes with the temporary folder
                raise Interrupted(stop.signal_number, "Finished students are kept.") from None

        # judge
        model.to(teacher.device)
        flops = self.system.depth * application_flops(model.config, num_tokens)
        return {
            **measure_gap(spans, teacher, self.states, self.system.image_size),
            "stored_parameters": sum(weight.numel() for weight in model.blocks.parameters()),
            "multiply_adds": flops // 2,
            "steps": steps,
        }


def student_key(teacher: str, student: Student) -> dict:
    """Return the entries by which a student on record is found."""
    return json.loads(json.dumps({"teacher": teacher, **asdict(student)}))


def record_file(folder: str | Path, teacher: str, student: Student) -> Path:
    """Return the file of a student on record: it is there when the student is trained."""
    key = json.dumps(student_key(teacher, student), sort_keys=True)
    return Path(folder) / "students" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def train_students(
    settings: Settings,
    teachers: dict[str, str],
    students: Sequence[tuple[str, Student]],
    folder: str | Path,
) -> None:
    """Train the students that are not on record, one after another.

    Args:
        settings: of the study.
        teachers: folders or Hub ids by name.
        students: each with the name of its teacher.
        folder: of the record.
    """
    (Path(folder) / "students").mkdir(parents=True, exist_ok=True)
    each, bench = list(dict.fromkeys(students)), None
    with (
        progress_bar("students", len(each), unit="student") as bar,
        open(os.devnull, "w", encoding="utf-8") as nowhere,
    ):
        for name, student in each:
            path = record_file(folder, name, student)
            if not path.exists():
                with redirect_stdout(nowhere), redirect_stderr(nowhere):
                    if bench is None or bench.name != teachers[name]:
                        bench = Bench(settings, teachers[name])
                    found = bench.train(student)
                write_json(path, {**student_key(name, student), **found})
            bar.update()

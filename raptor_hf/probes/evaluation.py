"""One task for the teacher and all models: probes, results, models with heads, pictures."""

import dataclasses
import shutil
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import DPTImageProcessorPil, PreTrainedModel

from ..activations.online import OnlineActivations
from ..data.arguments import CropArguments, ReadingArguments
from ..data.loading import Classes
from ..distillation.fidelity import trajectory_r2
from ..distillation.provenance import model_facts, training_facts
from ..loop.arguments import LoopArguments
from ..loop.checkpoints import remove_checkpoints
from ..runs.files import public_name, write_json
from ..runs.folder import environment
from ..runs.processes import process_state
from ..tasks.arguments import DenseArguments
from ..tasks.heads import attach_head, load_linear_head
from ..tasks.pictures import plot_class_maps, plot_depth_maps
from ..tasks.task import TASKS, Task
from ..teachers import load_backbone, load_processor
from .arguments import ProbeArguments
from .baselines import constant_metrics, nearest_neighbours
from .datasets import ProbeData, ProbeImageSets, make_task
from .training import Probe, check_head, original_size_metrics, train_probe

_PICTURES = 4  # validation images that are drawn


class _ProbedModel(NamedTuple):
    """A backbone with its head, and what it was probed on."""

    task: Task
    data: ProbeData
    probe: Probe
    knn: dict[str, float] | None  # accuracy of its nearest neighbours; classification alone


class Evaluation:
    """A task's images, and a folder for what is measured on them.

    `results/` gets a JSON a model, `models/` every Raptor with its head, `predictions/` what the
    picture is drawn from. All processes work on the same model; the main one writes.

    Args:
        teacher: folder or Hub id.
    """

    def __init__(
        self,
        recipe: ProbeArguments,
        crops: CropArguments,
        dense: DenseArguments,
        reading: ReadingArguments,
        loop: LoopArguments,
        teacher: str,
    ):
        self.recipe, self.reading, self.loop, self.teacher = recipe, reading, loop, teacher
        self.state, self.output_dir = process_state(), Path(loop.output_dir)
        self.features_dir = Path(recipe.features_dir or self.output_dir / "features")
        task = TASKS[recipe.task]
        # the images of a dense task are not resized by it
        resolution = None if task.dense else reading.resolution
        self.processor = load_processor(teacher, resolution=resolution)
        self.images = ProbeImageSets(recipe, crops, dense, reading, loop, task, self.processor)

    @cached_property
    def teacher_model(self) -> PreTrainedModel:
        """The teacher, which every Raptor's states are compared with."""
        return load_backbone(self.teacher).to(self.state.device)

    def result_file(self, name: str, task: str) -> Path:
        """Return where a model's result goes."""
        return self.output_dir / "results" / f"{name}_{task}.json"

    def evaluate_model(self, name: str, folder: str) -> None:
        """Probe one model and write its results, unless they are there already.

        The teacher comes first: its features are what the constant baseline is judged on.
        """
        if self.result_file(name, self.recipe.task).exists():
            return
        self.state.print(f"{name}: {folder}", flush=True)
        for made in ("results", "models"):
            (self.output_dir / made).mkdir(exist_ok=True)
        model = load_backbone(folder).to(self.state.device)
        facts = model_facts(model)
        if facts["phases"] and (training := training_facts(folder)):
            facts["training"] = training
        probed = self.probe_model(name, model)
        if name == "teacher":
            self.write_constant(probed)
        elif facts["phases"] and self.recipe.task == "classification":
            self.write_result(name, "r2", self.compare_states(model), facts, probed.data)
        if self.state.is_main_process:
            self.write_model(name, model, probed, facts)
        self.print_result(name, probed)
        self.state.wait_for_everyone()

    def probe_model(self, name: str, model: PreTrainedModel) -> _ProbedModel:
        """Train the heads of the recipe on a model, and select one."""
        recipe = self.recipe
        task = make_task(recipe, model.config, self.images.train.class_names)
        head = None
        if recipe.head:
            names = self.images.train.class_names
            classes = Classes(names, len(names)) if names else None  # depth has none
            head, _ = load_linear_head(
                recipe.head, config=model.config, task=type(task), classes=classes
            )
            check_head(task, head)
        data = self.images.data(model, task, self.features_dir)
        own = dataclasses.replace(self.loop, output_dir=str(self.output_dir / "probes" / name))
        probe = train_probe(task, data, recipe, own, model, head)
        knn = None
        if data.neighbours is not None:
            knn = nearest_neighbours(data.neighbours, data.validation, task)
        resolution = self.reading.resolution
        if resolution and task.name == "segmentation":
            probe.metrics["original_size"] = original_size_metrics(
                task, probe.head, data.validation, self.images.validation, resolution
            )
        return _ProbedModel(task, data, probe, knn)

    def compare_states(self, model: PreTrainedModel) -> dict:
        """Return R² of a Raptor's states on the validation images (`trajectory_r2`)."""
        plain = self.images.plain(self.images.validation, self.images.validation_rows)
        source = OnlineActivations(self.teacher_model, plain)
        return trajectory_r2(model, source, num_workers=self.loop.num_workers)

    def write_constant(self, probed: _ProbedModel) -> None:
        """Write what the best constant answer scores."""
        validation = probed.data.validation
        metrics = constant_metrics(
            probed.task, self.images.train, validation, skip_corrupt=self.reading.skip_corrupt
        )
        facts = {"phases": None, "block_parameters": None}
        self.write_result("constant", probed.task.name, metrics, facts, probed.data)

    def write_model(
        self, name: str, model: PreTrainedModel, probed: _ProbedModel, facts: dict
    ) -> None:
        """Write a model with its head, its predictions and, last, its result."""
        task, data, probe = probed.task, probed.data, probed.probe
        if facts["phases"]:  # a Raptor, not the teacher or a baseline
            self.save_model(name, model, task, probe, data)
            if "training" in facts:  # for the model's card
                write_json(self.output_dir / "models" / name / "training.json", facts["training"])
        if task.dense:
            self.save_predictions(name, task, probe, data)
        more = {"best_on_validation": probe.best_on_validation, "selected": probe.selected}
        if probed.knn is not None:
            more["knn"] = probed.knn
        self.write_result(name, task.name, probe.metrics, {**more, **facts}, data)
        remove_checkpoints(self.output_dir / "probes" / name)
        if self.recipe.features_dir is None:
            shutil.rmtree(self.features_dir, ignore_errors=True)

    def print_result(self, name: str, probed: _ProbedModel) -> None:
        """Print a model's score and which head it has."""
        probe, score = probed.probe, probed.task.score
        best = probe.best_on_validation
        self.state.print(
            f"{name}: {score} {probe.metrics[score]:.4f} after the last epoch, best on "
            f"validation {best['metrics'][score]:.4f} (epoch {best['epoch']}), learning rate "
            f"{probe.selected['learning_rate']:g}, head on {probe.selected['pooling']}",
            flush=True,
        )

    def write_result(
        self, name: str, task: str, metrics: dict, more: dict, judged_on: ProbeData
    ) -> None:
        """Write a result: what was measured, of whom, on what."""
        read = judged_on.validation.image_ids  # without what could not be read
        skipped = np.setdiff1d(self.images.validation_rows, read).tolist()
        plain = self.images.plain(self.images.validation)
        if self.state.is_main_process:
            result = {"model": name, "task": task, "seed": self.loop.seed, "metrics": metrics}
            data = {"dataset": public_name(self.recipe.dataset), "split": self.recipe.test_split}
            data |= {"num_images": len(read), "skipped_images": [*map(plain.public_path, skipped)]}
            data |= {"images_sha256": self.images.validation.files.content_digest}
            data |= {"environment": environment()}
            write_json(self.result_file(name, task), {**result, **more, **data})

    def save_model(
        self, name: str, model: PreTrainedModel, task: Task, probe: Probe, data: ProbeData
    ) -> None:
        """Save a Raptor with its head and its processor in one folder, for the Auto classes."""
        folder = self.output_dir / "models" / name
        names, processor = self.images.train.class_names, self.processor
        fields = task.config_fields()
        attach_head(
            model.cpu(), probe.head, names, model_class=task.model_class, **fields
        ).save_pretrained(folder)
        if task.dense:
            # the pipelines for dense tasks ask the processor to undo its resizing: this one can
            height, width = data.validation.targets.shape[1:]
            processor = DPTImageProcessorPil(
                size={"height": height, "width": width},
                image_mean=processor.image_mean,
                image_std=processor.image_std,
            )
        processor.save_pretrained(folder)

    @torch.no_grad()
    def save_predictions(self, name: str, task: Task, probe: Probe, data: ProbeData) -> None:
        """Save what a head says about some validation images."""
        rows = np.linspace(0, len(data.validation) - 1, _PICTURES).astype(int)
        batch = data.validation.__getitems__(rows.tolist())
        logits = task.logits(probe.head, batch["features"], batch["target"])
        prediction = task.predict(logits, batch["target"]).numpy()
        (self.output_dir / "predictions").mkdir(exist_ok=True)
        path = self.output_dir / "predictions" / f"{name}.npz"
        np.savez(path, prediction=prediction, rows=batch["image_id"].numpy())

    def draw_predictions(self, names: list[str]) -> Path | None:
        """Draw image, truth and what every model makes of it; return None for whole images."""
        if not TASKS[self.recipe.task].dense or not self.state.is_main_process:
            return None
        files = [np.load(self.output_dir / "predictions" / f"{name}.npz") for name in names]
        plain = self.images.plain(self.images.validation)
        pairs = [plain.view(*plain.images.read(row), (0,)) for row in files[0]["rows"].tolist()]
        images, targets = zip(*pairs, strict=True)
        maps = {"truth": targets, **{n: f["prediction"] for n, f in zip(names, files, strict=True)}}
        path = self.output_dir / "results" / f"{self.recipe.task}.png"
        if self.recipe.task == "depth":
            plot_depth_maps(images, maps, path)
        else:
            plot_class_maps(images, maps, self.images.train.class_names, path)
        return path

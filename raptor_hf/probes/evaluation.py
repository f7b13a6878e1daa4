"""Probe teacher and Raptors on one task: features, then heads, then results.

Teacher and Raptor go through the same code.
"""

import copy
import dataclasses
import logging
import math
import shutil
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import DPTImageProcessorPil, PreTrainedConfig, PreTrainedModel

from ..activations.online import OnlineActivations
from ..data.arguments import CropArguments, ReadingArguments
from ..data.loading import Classes
from ..data.transforms import Augmentation
from ..data.views import skip_corrupt
from ..distillation.fidelity import trajectory_r2
from ..distillation.provenance import check_teacher, model_facts, training_facts
from ..loop.arguments import LoopArguments
from ..loop.checkpoints import remove_checkpoints
from ..metrics import compute_over_processes
from ..runs.files import public_name, write_json
from ..runs.folder import environment
from ..runs.processes import process_state
from ..tasks.arguments import DenseArguments
from ..tasks.heads import attach_head, load_linear_head
from ..tasks.pictures import plot_class_maps, plot_depth_maps
from ..tasks.targets import check_classes
from ..tasks.task import TASKS, Depth, Task
from ..teachers import image_size, load_backbone, load_processor
from ..teachers.trunks import differing_weights
from .arguments import ProbeArguments
from .baselines import NEIGHBOUR_IMAGES, constant_metrics, nearest_neighbours
from .features import Features, compute_features
from .heads import Probe, head_grid, train_heads
from .images import ProbeImages, load_splits

logger = logging.getLogger(__name__)

_PICTURES = 4  # validation images that are drawn
_TARGETS = 1000  # training targets that are looked at first
# settings that change pixel values, beside sizes
_PIXEL_SETTINGS = ("do_convert_rgb", "do_rescale", "rescale_factor", "do_normalize")
_PIXEL_SETTINGS += ("image_mean", "image_std", "resample")


def make_task(
    recipe: ProbeArguments, config: PreTrainedConfig, class_names: list[str] | None
) -> Task:
    """Make the task of a recipe for a backbone of this configuration."""
    if recipe.task != "depth":
        return TASKS[recipe.task](config, len(class_names))
    return Depth(
        config,
        recipe.depth_bins,
        max_depth=recipe.max_depth,
        eval_crop=recipe.eval_crop or None,
    )


class Evaluation:
    """The images of a task, and the folder of its results.

    `results/` gets a JSON a model, `models/` every Raptor with its head, `predictions/` the arrays
    of the picture. All processes work on the same model; the main one writes.

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
        self.recipe, self.reading, self.loop = recipe, reading, loop
        self.teacher_name = teacher
        self.state, self.output_dir = process_state(), Path(loop.output_dir)
        self.tasks: dict[str, Task] = {}
        self.heads: dict[str, nn.Linear | None] = {}

        # the images, and the targets that a constant answer is fitted to
        task = TASKS[recipe.task]
        self.num_heads = len(head_grid(recipe, loop, task))
        self.splits = load_splits(recipe, dense, reading, num_heads=self.num_heads, seed=loop.seed)
        self.targets = self._some_targets()
        if task.name == "segmentation":
            check_classes(self.targets, self.splits.train.class_names, of=recipe.dataset)

        # all models get the same images: those that the teacher's processor makes
        resolution = None if task.dense else reading.resolution
        self.processor = load_processor(teacher, resolution=resolution)
        size = tuple(reading.resolution) or image_size(self.processor)
        self.augmentation = Augmentation.of(crops, size)

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """The teacher, which every Raptor is compared with."""
        return load_backbone(self.teacher_name).to(self.state.device)

    def files(self) -> dict:
        """Return the lists of image files, as `start_run` takes them."""
        return {
            "train_images": self.splits.train.files,
            "test_images": self.splits.validation.files,
        }

    def check_models(self, folders: dict[str, str]) -> None:
        """Load every model once, so that one that can't be judged is refused before the first is.

        `evaluate_model` takes the task and the first head of a model from here.

        Raises:
            ValueError: a Raptor that was made from another teacher, a model without the tokens of
                the task, or a head for other outputs.
        """
        keys = _PIXEL_SETTINGS
        if not TASKS[self.recipe.task].dense:
            keys += ("size", "crop_size")
        for name, folder in folders.items():
            model = self.teacher if name == "teacher" else load_backbone(folder)
            task = make_task(self.recipe, model.config, self.splits.train.class_names)
            head_grid(self.recipe, self.loop, task)
            self.tasks[name], self.heads[name] = task, self._load_head(task)
            if name == "teacher":
                continue

            check_teacher(folder, self.teacher)
            # all models get the same images
            ours, theirs = self.processor.to_dict(), load_processor(folder).to_dict()
            changed = [key for key in keys if ours.get(key) != theirs.get(key)]
            if changed:
                logger.warning(
                    "%s is judged, and saved, with the teacher's image processor; its own has "
                    "another %s. --resolution HEIGHT WIDTH sets the size.", name, ", ".join(changed)
                )  # fmt: skip
            differing = differing_weights(model, self.teacher) if hasattr(model, "shell") else []
            if differing:
                raise ValueError(
                    f"{name} was made from another teacher than {self.teacher_name}: their "
                    f"{', '.join(differing[:3])} differ. Give its own teacher."
                )

    def evaluate_model(self, name: str, folder: str) -> None:
        """Probe one model and write its results, unless they are there already.

        The teacher comes first: the constant baseline is judged on its validation images.
        """
        result_file = self._result_file(name, self.recipe.task)
        if result_file.exists():
            return
        self.state.print(f"{name}: {folder}", flush=True)
        model, task = self.teacher, self.tasks[name]
        if name != "teacher":
            model = load_backbone(folder).to(self.state.device)

        # a) features
        features_dir = self.output_dir / "features" / name
        train, selection, validation, neighbours = self._features(model, task, features_dir)

        # b) heads
        probe_dir = self.output_dir / "probes" / name
        loop = dataclasses.replace(self.loop, output_dir=str(probe_dir))
        probe = train_heads(
            task, train, selection, validation, self.recipe, loop,
            backbone=model, start=self.heads[name],
        )  # fmt: skip

        # c) results
        training, facts = training_facts(folder), model_facts(model)
        if facts["phases"]:
            facts["training"] = training
            if task.name == "classification":
                self._write_result(name, "r2", self._compare_states(model), validation, facts)
        if name == "teacher":
            metrics = constant_metrics(task, self.targets, validation)
            baseline = {"phases": None, "block_parameters": None}
            self._write_result("constant", task.name, metrics, validation, baseline)
        result = {"best_on_validation": probe.best_on_validation, "selected": probe.selected}
        if neighbours is not None and self.recipe.train_split != self.recipe.test_split:
            result["knn"] = nearest_neighbours(neighbours, validation, task)
        if self.reading.resolution and task.name == "segmentation":
            probe.metrics["original_size"] = self._original_size_metrics(task, probe, validation)

        # d) the model and, last, its result, which says that the model is done
        if self.state.is_main_process:
            if facts["phases"]:
                self._save_model(name, model, task, probe, validation)
                if training:  # for the model's card
                    shutil.copy(Path(folder) / "training.json", self.output_dir / "models" / name)
            if task.dense:
                self._save_predictions(name, task, probe.head, validation)
        self._write_result(name, task.name, probe.metrics, validation, {**result, **facts})
        if self.state.is_main_process:
            remove_checkpoints(probe_dir)
            shutil.rmtree(features_dir.parent)
        self._print_result(name, task, probe)
        self.state.wait_for_everyone()

    def _load_head(self, task: Task) -> nn.Linear | None:
        """Load the head that training starts from, its outputs in the order of the classes."""
        if not self.recipe.head:
            return None
        names = self.splits.train.class_names
        classes = Classes(names, len(names)) if names else None
        head, _ = load_linear_head(
            self.recipe.head, config=task.config, task=type(task), classes=classes
        )
        task.check_head(head)
        return head

    def _images(self, images, rows: np.ndarray | None = None, **options) -> ProbeImages:
        """Return images of a split as tensors; without further options as they are judged."""
        return ProbeImages(
            images,
            self.processor,
            rows=rows,
            resolution=tuple(self.reading.resolution) or None,
            **options,
        )

    def _features(self, model: PreTrainedModel, task: Task, folder: Path):
        """Return the images that heads learn from, and features that select, validate and vote.

        Returns:
            train: features, or images in random views.
            selection: None for one head.
            validation: features.
            neighbours: features of training images for k-NN, None for dense tasks.
        """
        splits = self.splits

        def compute(name: str, images, rows: np.ndarray) -> Features:
            return compute_features(
                model,
                task,
                skip_corrupt(self._images(images, rows), self.reading.skip_corrupt),
                folder / name,
                batch_size=self.recipe.eval_batch_size,
                num_workers=self.loop.num_workers,
            )

        # features of the training images, or new views of them in every step
        step = math.ceil(len(splits.train_rows) / NEIGHBOUR_IMAGES)
        neighbour_rows = splits.train_rows[::step]
        neighbours = selection = None
        if self.augmentation is None:
            train = compute("train", splits.train, splits.train_rows)
            if not task.dense:
                neighbours = train.choose(neighbour_rows)
        else:
            options = {"augmentation": self.augmentation, "seed": self.loop.seed}
            views = self._images(splits.train, splits.train_rows, **options)
            train = skip_corrupt(views, self.reading.skip_corrupt, replace=True)
            if not task.dense:
                neighbours = compute("neighbours", splits.train, neighbour_rows)

        # features of held-out training images, and of another split
        if self.num_heads > 1:
            selection = compute("selection", splits.train, splits.selection_rows)
        validation = compute("validation", splits.validation, splits.validation_rows)
        return train, selection, validation, neighbours

    def _compare_states(self, model: PreTrainedModel) -> dict:
        """Return R² of a Raptor's states on the validation images (`trajectory_r2`)."""
        images = self._images(self.splits.validation, self.splits.validation_rows)
        images = skip_corrupt(images, self.reading.skip_corrupt)
        source = OnlineActivations(self.teacher, images)
        return trajectory_r2(model, source, num_workers=self.loop.num_workers)

    @torch.no_grad()
    def _original_size_metrics(self, task: Task, probe: Probe, validation: Features) -> dict:
        """Return segmentation's metrics at the size that each mask has in its file."""
        device, rows = self.state.device, []
        resized = torch.empty(1, *self.reading.resolution)
        head = copy.deepcopy(probe.head).to(device)
        for batch in validation.batches(1):
            target = self.splits.validation.target(int(batch["image_id"]))
            target = torch.from_numpy(target)[None].to(device)
            logits = task.logits(head, batch["features"].to(device), resized)
            rows.append(task.statistics(task.predict(logits, target), target))
        return compute_over_processes(task.metric, rows)

    def _some_targets(self) -> list:
        """Return targets of training images, which the constant baseline is fitted to."""
        rows = np.random.default_rng(0).permutation(self.splits.train_rows)[:_TARGETS]
        targets = []
        for row in np.sort(rows).tolist():
            try:
                targets.append(self.splits.train.target(row))
            except ValueError:
                # unreadable images are counted where their features are computed
                if not self.reading.skip_corrupt:
                    raise
        return targets

    def _result_file(self, name: str, task: str) -> Path:
        """Return the path of a model's result."""
        return self.output_dir / "results" / f"{name}_{task}.json"

    def _write_result(
        self, name: str, task: str, metrics: dict, judged_on: Features, facts: dict
    ) -> None:
        """Write a result: metrics of a model, facts about it, and the images."""
        if not self.state.is_main_process:
            return
        images = self._images(self.splits.validation)
        skipped = np.setdiff1d(self.splits.validation_rows, judged_on.image_ids).tolist()
        path = self._result_file(name, task)
        path.parent.mkdir(exist_ok=True)
        result = {
            "model": name,
            "task": task,
            "seed": self.loop.seed,
            "metrics": metrics,
            **facts,
            "dataset": public_name(self.recipe.dataset),
            "split": self.recipe.test_split,
            "num_images": len(judged_on),
            "skipped_images": [images.public_path(image_id) for image_id in skipped],
            "images_sha256": self.splits.validation.files.content_digest,
            "environment": environment(),
        }
        write_json(path, result)

    def _print_result(self, name: str, task: Task, probe: Probe) -> None:
        """Print a model's score and its head."""
        best = probe.best_on_validation
        self.state.print(
            f"{name}: {task.score} {probe.metrics[task.score]:.4f} after the last epoch, best on "
            f"validation {best['metrics'][task.score]:.4f} (epoch {best['epoch']}), learning rate "
            f"{probe.selected['learning_rate']:g}, head on {probe.selected['pooling']}",
            flush=True,
        )

    def _save_model(
        self, name: str, model: PreTrainedModel, task: Task, probe: Probe, validation: Features
    ) -> None:
        """Save a Raptor with its head and its processor in one folder, for the Auto classes."""
        folder = self.output_dir / "models" / name
        names, processor = self.splits.train.class_names, self.processor
        attach_head(
            model.cpu(), probe.head, names, model_class=task.model_class, **task.config_fields()
        ).save_pretrained(folder)
        if task.dense:
            # the pipelines for dense tasks ask the processor to undo its resizing: this one can
            settings = processor.to_dict()
            height, width = validation.__getitems__([0])["target"].shape[1:]
            processor = DPTImageProcessorPil(
                size={"height": height, "width": width},
                do_reduce_labels=self.splits.train.first_label == 1,
                **{key: settings[key] for key in _PIXEL_SETTINGS if key in settings},
            )
        processor.save_pretrained(folder)

    @torch.no_grad()
    def _save_predictions(
        self, name: str, task: Task, head: nn.Linear, validation: Features
    ) -> None:
        """Save a head's predictions for some validation images."""
        rows = np.linspace(0, len(validation) - 1, _PICTURES).astype(int)
        batch = validation.__getitems__(rows.tolist())
        logits = task.logits(head, batch["features"], batch["target"])
        prediction = task.predict(logits, batch["target"]).numpy()
        path = self.output_dir / "predictions" / f"{name}.npz"
        path.parent.mkdir(exist_ok=True)
        np.savez(path, prediction=prediction, rows=batch["image_id"].numpy())

    def draw_predictions(self, names: list[str]) -> Path | None:
        """Draw images, targets and every model's predictions; None for a task of whole images."""
        if not TASKS[self.recipe.task].dense or not self.state.is_main_process:
            return None
        predictions = {
            name: np.load(self.output_dir / "predictions" / f"{name}.npz") for name in names
        }
        rows = predictions[names[0]]["rows"].tolist()
        validation = self._images(self.splits.validation)
        images, targets = zip(*(validation.read(row) for row in rows), strict=True)
        maps = {"truth": targets}
        maps |= {name: arrays["prediction"] for name, arrays in predictions.items()}
        path = self.output_dir / "results" / f"{self.recipe.task}.png"
        if self.recipe.task == "depth":
            plot_depth_maps(images, maps, path)
        else:
            plot_class_maps(images, maps, self.splits.train.class_names, path)
        return path

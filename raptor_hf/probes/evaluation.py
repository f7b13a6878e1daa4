"""Probe teacher and Raptors on one task: features, then heads, then results.

Teacher and Raptor go through the same code.
"""

import dataclasses
import logging
import shutil
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import send_to_device
from matplotlib import colormaps
from matplotlib.image import imsave
from torch import nn
from transformers import DPTImageProcessorPil, PreTrainedModel

from ..activations.online import OnlineActivations
from ..data.arguments import CropArguments, ReadingArguments
from ..data.transforms import Augmentation
from ..data.views import read_or_next
from ..distillation.fidelity import trajectory_r2
from ..distillation.provenance import check_teacher, model_facts, training_facts
from ..loop.arguments import LoopArguments
from ..loop.checkpoints import remove_checkpoints
from ..runs.files import public_name, write_json
from ..runs.folder import environment
from ..runs.processes import process_state
from ..tasks.arguments import DenseArguments
from ..tasks.heads import attach_head, load_linear_head
from ..tasks.targets import IGNORED, check_classes
from ..tasks.task import TASKS, Task
from ..teachers import image_size, load_backbone, load_processor
from ..teachers.trunks import check_same_shell
from . import scores
from .arguments import ProbeArguments
from .features import Features, compute_features
from .heads import head_grid, train_heads
from .images import ProbeImages, load_splits

logger = logging.getLogger(__name__)

_PICTURES = 4  # validation images that are drawn
_TARGETS = 1000  # targets that are looked at first
# settings that change pixel values, beside sizes
_PIXEL_SETTINGS = ("do_convert_rgb", "do_rescale", "rescale_factor", "do_normalize")
_PIXEL_SETTINGS += ("image_mean", "image_std", "resample")


class Evaluation:
    """The models and the images of a task, and the folder of its results.

    `results/` gets `<model>_<task>.json`; for classification, `<model>_r2.json` of every Raptor;
    for dense tasks, a picture of some predictions. `models/` gets every Raptor with its head. All
    processes work on the same model; the main one writes.

    Args:
        folders: folder or Hub id of every model by name; the first is `teacher`.
    """

    def __init__(
        self,
        recipe: ProbeArguments,
        crops: CropArguments,
        dense: DenseArguments,
        reading: ReadingArguments,
        loop: LoopArguments,
        folders: dict[str, str],
    ):
        self.recipe, self.reading, self.loop, self.folders = recipe, reading, loop, folders
        self.state, self.output_dir = process_state(), Path(loop.output_dir)
        num_heads = len(head_grid(recipe, loop, TASKS[recipe.task]))

        # all models get the same images: those that the teacher's processor makes
        resolution = None if TASKS[recipe.task].dense else reading.resolution
        self.processor = load_processor(folders["teacher"], resolution=resolution)
        self.splits = load_splits(
            recipe, dense, reading, self.processor, num_heads=num_heads, seed=loop.seed
        )
        size = tuple(reading.resolution) or image_size(self.processor)
        self.augmentation = Augmentation.of(crops, size)

        # model, task and first head by name, from `load_models`
        self.loaded: dict[str, tuple[PreTrainedModel, Task, nn.Linear | None]] = {}

    def load_models(self) -> None:
        """Load every model, and refuse models and targets that can't be judged.

        Raises:
            ValueError: a Raptor that was made from another teacher, a model without the tokens of
                the task, a head for other outputs, or targets none of which counts.
        """
        recipe, names, options = self.recipe, self.splits["train"].images.class_names, {}
        if recipe.task == "depth":
            options = {"max_depth": recipe.max_depth, "eval_crop": recipe.eval_crop}
        for name, folder in self.folders.items():
            model = load_backbone(folder)
            number = len(names) if names else recipe.depth_bins
            task = TASKS[recipe.task](model.config, number, **options)
            head_grid(recipe, self.loop, task)
            self.loaded[name] = (model, task, self._load_head(task))
            if name != "teacher":
                self._compare_with_teacher(name)
        teacher, task, _ = self.loaded["teacher"]
        teacher.to(self.state.device)

        # the constant answer is fitted to training targets
        targets = self._some_targets(self.splits["train"])
        if task.name == "segmentation":
            check_classes(targets, names, of=recipe.dataset)
        self.constant_answer = task.constant(targets)
        del targets  # they are large where every pixel has one
        task.constant(self._some_targets(self.splits["validation"]))

    def _load_head(self, task: Task) -> nn.Linear | None:
        """Load the head that training starts from, its outputs in the order of the classes."""
        source, names = self.recipe.head, self.splits["train"].images.class_names
        if not source:
            return None
        head, _ = load_linear_head(source, config=task.config, task=type(task), class_names=names)
        if head.out_features != task.num_outputs:
            raise ValueError(
                f"{source} has {head.out_features} outputs, but {task.num_outputs} (classes, or "
                "--depth_bins) are asked for. Give a head for these, or none."
            )
        return head

    def _compare_with_teacher(self, name: str) -> None:
        """Refuse a Raptor of another teacher; warn of another image processor."""
        folder, (model, task, _) = self.folders[name], self.loaded[name]
        teacher = self.loaded["teacher"][0]
        check_teacher(folder, teacher)
        # its weights around the blocks are the teacher's
        if hasattr(model, "shell"):
            teacher_name = self.folders["teacher"]
            check_same_shell(model, teacher, name=name, teacher_name=teacher_name)
        # its image processor may be another one
        keys = _PIXEL_SETTINGS + (() if task.dense else ("size", "crop_size"))
        ours, theirs = self.processor.to_dict(), load_processor(folder).to_dict()
        changed = [key for key in keys if ours.get(key) != theirs.get(key)]
        if changed:
            logger.warning(
                "%s is judged, and saved, with the teacher's image processor; its own has another "
                "%s. --resolution HEIGHT WIDTH sets the size.", name, ", ".join(changed)
            )  # fmt: skip

    def _some_targets(self, split: ProbeImages) -> list:
        """Return the targets of some images, at most 1,000."""
        rows = np.sort(np.random.default_rng(0).permutation(split.image_ids)[:_TARGETS])
        options = {"skip_corrupt": self.reading.skip_corrupt}
        return [read_or_next(split.images.target, rows, i, **options) for i in range(len(rows))]

    def evaluate_model(self, name: str) -> None:
        """Probe one model and write its results, unless they are there already."""
        result_file = self._result_file(name, self.recipe.task)
        if result_file.exists():
            return
        self.state.print(f"{name}: {self.folders[name]}", flush=True)
        model, task, start = self.loaded[name]
        model.to(self.state.device)

        # a) features
        features_dir = self.output_dir / "features" / name
        train, selection, validation, neighbours = self._features(model, task, features_dir)
        if name == "teacher":
            metrics = scores.score(task, validation, scores.predict_constant(self.constant_answer))
            facts = {"phases": None, "block_parameters": None}
            self._write_result("constant", task.name, metrics, validation, facts)

        # b) heads
        probe_dir = self.output_dir / "probes" / name
        loop = dataclasses.replace(self.loop, output_dir=str(probe_dir))
        head, selected = train_heads(
            task, train, selection, self.recipe, loop, backbone=model, start=start
        )

        # c) results
        predict = scores.predict_by_head(task, head)
        metrics = scores.score(task, validation, predict, self.recipe.eval_batch_size)
        if self.reading.resolution and task.name == "segmentation":
            images = self.splits["validation"].images
            metrics["original_size"] = scores.score(task, validation, predict, original=images)
        if not task.dense and self.recipe.train_split != self.recipe.test_split:
            votes = scores.predict_by_neighbours(neighbours, task)
            metrics["knn"] = scores.score(task, validation, votes)
        facts = {"selected": selected, **model_facts(model)}
        if facts["phases"]:
            facts["training"] = training_facts(self.folders[name])
            if task.name == "classification":
                states = OnlineActivations(self.loaded["teacher"][0], self.splits["validation"])
                r2 = trajectory_r2(model, states, num_workers=self.loop.num_workers)
                self._write_result(name, "r2", r2, validation, facts)

        # d) the model and, last, its result, which says that the model is done
        if self.state.is_main_process:
            if facts["phases"]:
                self._save_model(name, model, task, head, validation)
            if task.dense:
                self._draw_predictions(name, task, predict, validation)
        self._write_result(name, task.name, metrics, validation, facts)
        if self.state.is_main_process:
            remove_checkpoints(probe_dir)
            shutil.rmtree(features_dir.parent)
        self.state.print(f"{name}: {task.score} {metrics[task.score]:.4f}, {selected}", flush=True)
        self.state.wait_for_everyone()

    def _features(self, model: PreTrainedModel, task: Task, folder: Path):
        """Return what heads learn from (features, or images in random views), the features that
        select (None for one head) and validate, and those of training images for k-NN.
        """

        def compute(name: str, split: ProbeImages) -> Features:
            return compute_features(
                model, task, split, folder / name,
                batch_size=self.recipe.eval_batch_size, num_workers=self.loop.num_workers,
            )  # fmt: skip

        # features of the training images, or new views of them in every step
        split, neighbours, selection = self.splits["train"], None, None
        if self.augmentation is None or not task.dense:
            train = neighbours = compute("train", split)
        if self.augmentation is not None:
            options = {"augmentation": self.augmentation, "seed": self.loop.seed}
            train = dataclasses.replace(split, **options)

        # features of held-out training images, and of another split
        if len(self.splits["selection"]):
            selection = compute("selection", self.splits["selection"])
        return train, selection, compute("validation", self.splits["validation"]), neighbours

    def _result_file(self, name: str, task: str) -> Path:
        """Return the path of a model's result."""
        return self.output_dir / "results" / f"{name}_{task}.json"

    def _write_result(
        self, name: str, task: str, metrics: dict, judged_on: Features, facts: dict
    ) -> None:
        """Write a result: metrics of a model, facts about it, and the images."""
        if not self.state.is_main_process:
            return
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
            "images_sha256": self.splits["validation"].images.files.content_digest,
            "environment": environment(),
        }
        write_json(path, result)

    def _save_model(
        self, name: str, model: PreTrainedModel, task: Task, head: nn.Linear, validation: Features
    ) -> None:
        """Save a Raptor with its head and its processor in one folder, for the Auto classes."""
        folder = self.output_dir / "models" / name
        images, processor = self.splits["train"].images, self.processor
        options = {"model_class": task.model_class, **task.config_fields}
        attach_head(model, head, images.class_names, **options).save_pretrained(folder)
        training = Path(self.folders[name]) / "training.json"
        if training.is_file():  # for the model's card
            shutil.copy(training, folder)
        if task.dense:
            # the pipelines for dense tasks ask the processor to undo its resizing: this one can
            settings = processor.to_dict()
            height, width = validation.__getitems__([0])["target"].shape[1:]
            processor = DPTImageProcessorPil(
                size={"height": height, "width": width},
                do_reduce_labels=images.first_label == 1,
                **{key: settings[key] for key in _PIXEL_SETTINGS if key in settings},
            )
        processor.save_pretrained(folder)

    @torch.no_grad()
    def _draw_predictions(
        self, name: str, task: Task, predict: scores.Predict, validation: Features
    ) -> None:
        """Draw some validation images, a row each, beside their targets and the predictions."""
        rows = np.linspace(0, len(validation) - 1, _PICTURES).astype(int).tolist()
        batch = send_to_device(validation.__getitems__(rows), self.state.device)
        predictions = predict(batch, batch["target"]).cpu().numpy()
        split = self.splits["validation"]
        places = np.searchsorted(split.image_ids, batch["image_id"].cpu().numpy())
        pictures = []
        for place, prediction in zip(places, predictions, strict=True):
            image, target = split.read(place)
            maps = [_in_colours(values, self.recipe.max_depth) for values in (target, prediction)]
            pictures.append(np.hstack([image / 255, *maps]))
        imsave(self._result_file(name, task.name).with_suffix(".png"), np.vstack(pictures))


def _in_colours(values: np.ndarray, farthest: float) -> np.ndarray:
    """Return classes, or metres up to the farthest, as colours (H, W, 3), white where unknown."""
    if values.dtype.kind == "f":
        colours, unknown = colormaps["viridis_r"](values / farthest), values == 0
    else:
        colours, unknown = colormaps["tab20"](values % 20), values == IGNORED
    colours[unknown] = 1
    return colours[..., :3]

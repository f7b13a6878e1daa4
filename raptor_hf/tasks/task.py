"""The tasks that frozen backbones are judged on. Whatever depends on the task is in its class.

Every head is one linear layer on the tokens after the final norm. Teacher and Raptor are judged
alike: a task only needs the configuration of the backbone.
"""

from collections.abc import Callable

import evaluate
import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForDepthEstimation,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
)

from ..configuration_raptor import token_layout
from ..metrics import (
    Accuracy,
    DepthError,
    MeanIoU,
    depth_statistics,
    label_ranks,
    segmentation_statistics,
)
from ..modeling_raptor_heads import (
    PatchFrame,
    RaptorForDepthEstimation,
    RaptorForImageClassification,
    RaptorForSemanticSegmentation,
    depth_logits,
    depth_loss,
    drop_registers,
    expected_depth,
    pool_tokens,
    resize_maps,
    segmentation_logits,
)
from .dense_images import load_depth, load_segmentation
from .labelled_images import LabelledImages, load_classification
from .targets import IGNORED


class Task:
    """A task for a linear head: its images, features, loss, prediction and metric.

    A subclass has the attributes below and the methods `logits(head, features, target)`,
    `loss(logits, target)`, `predict(logits, target)`, `statistics(prediction, target)` (rows for
    the metric, one an image) and `constant(targets)` (the constant answer that fits some targets
    best, without axes of images and pixels). A target is (B,) or (B, H, W); for logits and
    predictions only its size counts.

    Args:
        config: of the backbone.
        num_outputs: classes, or bins of depth.

    Attributes:
        name: among `TASKS`, and in result files.
        score: the deciding figure, a key of the metric's result.
        dense: an answer at every pixel, for images of any size.
        poolings: the tokens that heads look at: first all, then those that may stand alone.
        model_class, auto_class: the Raptor with such a head, and how transformers loads it.
        head_types: model types with such a head as their classifier.
        config_fields: of a Raptor's configuration for such a head, beside the class names.
        load: (dataset, split, reading, dense) to its images and targets.
    """

    name: str
    score: str
    dense = True
    poolings: tuple[str, ...]
    metric: type[evaluate.Metric]
    model_class: type
    auto_class: type
    head_types: tuple[str, ...] = ("raptor",)
    config_fields: dict = {}
    load: Callable[..., LabelledImages]

    def __init__(self, config: PreTrainedConfig, num_outputs: int):
        self.config, self.num_outputs = config, num_outputs
        if not token_layout(config).num_cls:
            self.poolings = tuple(p for p in self.poolings if "cls" not in p)
            if not self.poolings:
                raise ValueError(
                    f"A probe of {self.name} looks at the cls token, and a "
                    f"{config.model_type!r} has none."
                )

    @classmethod
    def head_width(cls, config: PreTrainedConfig) -> int:
        """Return the inputs of a head on a backbone: D for the patches, D for the cls token."""
        with_cls = "cls" in cls.poolings[0] and token_layout(config).num_cls > 0
        return (1 + with_cls) * config.hidden_size

    def features(self, last_hidden_state: torch.Tensor) -> torch.Tensor:
        """Return the inputs of heads (B, 1 + h·w, D), cls and patches after the final norm."""
        return drop_registers(last_hidden_state, self.config)


class Classification(Task):
    """A class an image, from [cls, mean of patches] as in DINOv2, or one of the two alone."""

    name, score, dense = "classification", "accuracy", False
    poolings = ("cls_patches", "cls", "patches")
    metric = Accuracy
    model_class, auto_class = RaptorForImageClassification, AutoModelForImageClassification
    # the width does not tell them: ViT-B's head on cls alone is as wide as DINOv2-S's on both
    head_types = ("dinov2", "dinov2_with_registers", "raptor")
    load = staticmethod(load_classification)

    def features(self, last_hidden_state):
        """Return (B, 2·D); without a cls token (B, D)."""
        return pool_tokens(last_hidden_state, self.config)

    def logits(self, head: nn.Linear, features: torch.Tensor, target: torch.Tensor):
        """Return (B, classes)."""
        return head(features)

    def loss(self, logits: torch.Tensor, target: torch.Tensor):
        """Return the cross-entropy."""
        return nn.functional.cross_entropy(logits, target)

    def predict(self, logits: torch.Tensor, target: torch.Tensor):
        """Return the logits: the metric looks at the five best classes."""
        return logits

    def statistics(self, prediction: torch.Tensor, target: torch.Tensor):
        """Return `label_ranks`."""
        return label_ranks(logits=prediction, labels=target)

    def constant(self, targets: list):
        """Return the number of targets of each class (classes,), as logits."""
        return torch.bincount(torch.tensor(targets), minlength=self.num_outputs).float()


class Segmentation(Task):
    """A class a pixel, from its patch."""

    name, score = "segmentation", "miou"
    poolings = ("patches",)
    metric = MeanIoU
    model_class, auto_class = RaptorForSemanticSegmentation, AutoModelForSemanticSegmentation
    load = staticmethod(load_segmentation)

    def logits(self, head: nn.Linear, features: torch.Tensor, target: torch.Tensor):
        """Return (B, classes, H, W)."""
        frame = PatchFrame.of(target.shape[1:], self.config)
        return frame.interpolate(segmentation_logits(head, features, frame.grid))

    def loss(self, logits: torch.Tensor, target: torch.Tensor):
        """Return the cross-entropy, 0 at pixels without a class, as a mean over all pixels: those
        with a class weigh alike, however a batch is divided among processes.
        """
        losses = nn.functional.cross_entropy(logits, target, ignore_index=IGNORED, reduction="none")
        return losses.mean()

    def predict(self, logits: torch.Tensor, target: torch.Tensor):
        """Return the classes (B, H, W) at the size of the target."""
        if logits.shape[-2:] != target.shape[-2:]:
            logits = resize_maps(logits, target.shape[-2:])
        return logits.argmax(dim=1)

    def statistics(self, prediction: torch.Tensor, target: torch.Tensor):
        """Return `segmentation_statistics`."""
        return segmentation_statistics(
            prediction=prediction, target=target, num_classes=self.num_outputs, ignore_index=IGNORED
        )

    def constant(self, targets: list):
        """Return the most frequent class.

        Raises:
            ValueError: no pixel has a class.
        """
        counts = np.zeros(self.num_outputs, dtype=int)
        for target in targets:
            counts += np.bincount(target[target != IGNORED], minlength=self.num_outputs)
        if not counts.any():
            raise ValueError(f"No pixel of {len(targets)} masks has a class: all are ignored.")
        return torch.tensor(int(np.argmax(counts)))


class Depth(Task):
    """Metres at every pixel, from [patch, cls], with DINOv2's bins of depth.

    Args:
        max_depth: where the bins end, in metres; farther pixels don't count.
        eval_crop: rows and columns (top, bottom, left, right) that are judged, as Eigen's crop of
            NYUv2; all where it is None.
    """

    name, score = "depth", "rmse_m"
    poolings = ("cls_patches",)
    metric = DepthError
    model_class, auto_class = RaptorForDepthEstimation, AutoModelForDepthEstimation
    load = staticmethod(load_depth)

    def __init__(self, config, num_outputs, *, max_depth=10.0, eval_crop=None):
        super().__init__(config, num_outputs)
        self.limits = {"min_depth": 0.001, "max_depth": max_depth}
        self.config_fields = {"depth_bins": num_outputs, **self.limits}
        self.eval_crop = eval_crop

    def logits(self, head: nn.Linear, features: torch.Tensor, target: torch.Tensor):
        """Return (B, bins, 4·h, 4·w), over the padded image."""
        return depth_logits(head, features, PatchFrame.of(target.shape[1:], self.config).grid)

    def loss(self, logits: torch.Tensor, target: torch.Tensor):
        """Return `depth_loss` of every image, weighted by its share of valid pixels, as a mean: so
        valid pixels weigh alike, however a batch is divided among processes.
        """
        frame = PatchFrame.of(target.shape[1:], self.config)
        losses = []
        for image in zip(logits, self.predict(logits, target), target, strict=True):
            losses.append(depth_loss(*(one[None] for one in image), frame, **self.limits))
        return (torch.stack(losses) * self._valid(target).float().mean(dim=(1, 2))).mean()

    def _valid(self, target):
        """Return where depth is known and within the bins."""
        return (target >= self.limits["min_depth"]) & (target <= self.limits["max_depth"])

    def predict(self, logits: torch.Tensor, target: torch.Tensor):
        """Return (B, H, W) in metres."""
        return expected_depth(logits, PatchFrame.of(target.shape[1:], self.config), **self.limits)

    def statistics(self, prediction: torch.Tensor, target: torch.Tensor):
        """Return `depth_statistics` of the pixels in the crop with a known depth within the bins.

        Raises:
            ValueError: images smaller than the crop.
        """
        valid = self._valid(target)
        # of a crop, pixels outside of it do not count
        if self.eval_crop:
            top, bottom, left, right = self.eval_crop
            if bottom > target.shape[1] or right > target.shape[2]:
                raise ValueError(
                    f"eval_crop judges rows {top}–{bottom} and columns {left}–{right}, but the "
                    f"images have {target.shape[1]}×{target.shape[2]} pixels."
                )
            inside = torch.zeros_like(valid)
            inside[:, top:bottom, left:right] = True
            valid &= inside
        return depth_statistics(prediction=prediction, target=target, valid=valid)

    def constant(self, targets: list):
        """Return the mean depth, which has the smallest RMSE.

        Raises:
            ValueError: no pixel has a known depth within the bins.
        """
        depth = np.concatenate([target[self._valid(target)] for target in targets])
        if not len(depth):
            raise ValueError(
                f"No pixel of {len(targets)} depth maps lies within {self.limits['max_depth']:g} m."
                " Check --depth_unit_m and --max_depth."
            )
        return torch.tensor(float(depth.mean()))


TASKS = {task.name: task for task in (Classification, Segmentation, Depth)}

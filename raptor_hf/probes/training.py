"""Linear heads on a frozen backbone: a grid of them in one pass, selected apart from validation.

Teacher and Raptor go through the same code: nothing here asks which of the two it holds.
"""
# `train_probe` is over 40 lines: the loss and the validation are closures of what it is given.

import copy
import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, set_seed

from ..loop.arguments import LoopArguments
from ..loop.fit import Validation, fit
from ..loop.log import read_log
from ..loop.scalars import StepResult
from ..metrics import compute_over_processes
from ..runs.processes import process_state
from ..tasks.labelled_images import LabelledImages
from ..tasks.task import Task
from .arguments import ProbeArguments
from .datasets import Candidate, ProbeData, head_grid
from .features import StoredFeatures, backbone_features


class PooledLinear(nn.Linear):
    """A head that looks at some of its inputs only; the other weights are and stay zero."""

    def __init__(self, task: Task, pooling: str):
        size = task.config.hidden_size
        super().__init__(task.head_width(task.config), task.num_outputs)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        alone = {"cls": slice(0, size), "patches": slice(size, None)}
        both = pooling == task.poolings[0]
        self.columns = slice(None) if both else alone[pooling]

    def start_from(self, head: nn.Linear) -> None:
        """Copy a head's weights, as far as this one looks at the same inputs."""
        with torch.no_grad():
            self.weight[:, self.columns] = head.weight[:, self.columns]
            self.bias.copy_(head.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return (…, F) to (…, outputs)."""
        weight = self.weight[:, self.columns]
        return nn.functional.linear(features[..., self.columns], weight, self.bias)

    def plain(self) -> nn.Linear:
        """Return the same head as an ordinary linear layer, on the CPU."""
        head = nn.Linear(self.in_features, self.out_features)
        head.load_state_dict({name: w.cpu() for name, w in self.state_dict().items()})
        return head


class ProbeHeads(nn.Module):
    """The heads of a grid on the same features, and a twin of each that selects.

    A twin is trained like its head, but never on the images that heads are selected on. So the head
    that is selected has seen every training image, and its twin was judged on images new to it.

    Args:
        head: what all of them start from; default: zeros.
        twins: False where there is nothing to select.
    """

    def __init__(
        self, task: Task, candidates: list[Candidate], head: nn.Linear | None, *, twins: bool
    ):
        super().__init__()
        self.task = task
        self.heads = nn.ModuleList(PooledLinear(task, c.pooling) for c in candidates)
        self.twins = nn.ModuleList(PooledLinear(task, c.pooling) for c in candidates * twins)
        for pooled in [*self.heads, *self.twins] if head is not None else ():
            pooled.start_from(head)

    def forward(
        self, features: torch.Tensor, target: torch.Tensor, held_out: torch.Tensor
    ) -> list[torch.Tensor]:
        """Return the loss of every head, then of every twin.

        Args:
            held_out: (B,), True for the images that twins don't see.
        """
        losses = [self.loss(head, features, target) for head in self.heads]
        if self.twins:
            features, target = features[~held_out], target[~held_out]
        return losses + [self.loss(twin, features, target) for twin in self.twins]

    def loss(self, head: nn.Linear, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return one head's loss; 0 where no image is left."""
        if not len(target):
            return 0.0 * (head.weight.sum() + head.bias.sum())
        if self.task.dense and len(self.heads) > 1:
            # logits at every pixel are large: those of one head at a time are in memory
            return checkpoint(self.full_loss, head, features, target, use_reentrant=False)
        return self.full_loss(head, features, target)

    def full_loss(self, head, features, target) -> torch.Tensor:
        """Return the loss of one head on features."""
        return self.task.loss(self.task.logits(head, features, target), target)


@dataclass
class Probe:
    """A trained head, and how it did.

    Args:
        metrics: on validation, after the last epoch.
        best_on_validation: `epoch`, and `metrics` after it, scalars only.
        selected: learning rate and pooling of the head, and its twin's loss on the images that
            select (None without a grid).
    """

    head: nn.Linear
    metrics: dict
    best_on_validation: dict
    selected: dict


@torch.no_grad()
def _score_heads(
    task: Task, heads: nn.ModuleList, features: StoredFeatures, batch_size: int
) -> list[dict]:
    """Return the metric of every head; the processes share the images."""
    rows = [[] for _ in heads]
    device = process_state().device
    for batch in features.batches(batch_size, share=True):
        target, inputs = batch["target"].to(device), batch["features"].to(device)
        for head_rows, head in zip(rows, heads, strict=True):
            prediction = task.predict(task.logits(head, inputs, target), target)
            head_rows.append(task.statistics(prediction, target))
    return [
        compute_over_processes(task.metric(keep_in_memory=True), head_rows) for head_rows in rows
    ]


@torch.no_grad()
def _selection_losses(heads: ProbeHeads, features: StoredFeatures, batch_size: int) -> list[float]:
    """Return the loss of every twin on the images that select: finer than a score."""
    device, rows = process_state().device, []
    for batch in features.batches(batch_size, share=True):
        target, inputs = batch["target"].to(device), batch["features"].to(device)
        losses = [heads.full_loss(twin, inputs, target).item() for twin in heads.twins]
        rows.append((len(target), losses))
    rows = gather_object(rows)
    total = sum(number for number, _ in rows)
    return [
        sum(number * losses[i] for number, losses in rows) / total for i in range(len(heads.twins))
    ]


def train_probe(
    task: Task,
    data: ProbeData,
    recipe: ProbeArguments,
    loop: LoopArguments,
    backbone: PreTrainedModel,
    head: nn.Linear | None = None,
) -> Probe:
    """Train the heads of a grid side by side on a frozen backbone, and select one.

    Args:
        loop: its `steps` may be None: those of the recipe's epochs.
        head: what they start from; default: zeros.

    Raises:
        ValueError: a head for another number of classes, or a batch larger than the training set.
    """
    set_seed(loop.seed)
    check_head(task, head)
    candidates = head_grid(recipe, loop, task)
    heads = ProbeHeads(task, candidates, head, twins=data.selection is not None)
    selecting = torch.tensor(data.selection.image_ids if data.selection else [], dtype=torch.long)
    epoch_steps = max(1, len(data.train) // loop.batch_size)
    steps = recipe.epochs * epoch_steps if loop.steps is None else loop.steps
    latest: list[dict] = []

    def compute_loss(module, batch, progress):
        features = batch.get("features")
        if features is None:
            features = backbone_features(backbone, task, batch["pixel_values"])
        held_out = torch.isin(batch["image_id"], selecting.to(batch["image_id"].device))
        losses = module(features, batch["target"], held_out)
        # a sum: each head learns as if it were alone
        named = {f"loss/{c}": loss for c, loss in zip(candidates, losses, strict=False)}
        return StepResult(sum(losses), named)

    def validate():
        latest[:] = _score_heads(task, heads.heads, data.validation, recipe.eval_batch_size)
        return {
            f"{candidate}/{name}": value
            for candidate, metrics in zip(candidates, latest, strict=True)
            for name, value in metrics.items()
            if isinstance(value, float)
        }

    groups = [
        {"params": list(part.parameters()), "lr": candidate.learning_rate}
        for parts in (heads.heads, heads.twins)
        for part, candidate in zip(parts, candidates, strict=False)
    ]
    fit(
        heads, data.train, compute_loss, dataclasses.replace(loop, steps=steps),
        groups=groups, new_views=True,
        validation=Validation(validate, recipe.validate_epochs * epoch_steps),
    )  # fmt: skip
    number, loss = 0, None
    if data.selection is not None:
        losses = _selection_losses(heads, data.selection, recipe.eval_batch_size)
        number = int(np.nanargmin(losses))
        loss = losses[number]
    process_state().wait_for_everyone()  # until the log is written
    log = read_log(loop.output_dir)
    return Probe(
        heads.heads[number].plain(),
        latest[number],
        best_epoch(task, log, str(candidates[number]), epoch_steps),
        {**candidates[number]._asdict(), "selection_loss": loss},
    )


def best_epoch(task: Task, log: list[dict], candidate: str, epoch_steps: int) -> dict:
    """Return where a head's score on validation was best: `epoch`, and the `metrics` after it."""
    validations = [line for line in log if f"{candidate}/{task.score}" in line]
    best = validations[task.best([line[f"{candidate}/{task.score}"] for line in validations])]
    prefix = f"{candidate}/"
    metrics = {k.removeprefix(prefix): v for k, v in best.items() if k.startswith(prefix)}
    return {"epoch": math.ceil(best["step"] / epoch_steps), "metrics": metrics}


def check_head(task: Task, head: nn.Linear | None) -> None:
    """Refuse a head for another number of outputs."""
    if head is not None and head.out_features != task.num_outputs:
        kind = "bins of depth" if task.name == "depth" else "classes"
        raise ValueError(
            f"The head has {head.out_features} {kind}, but {task.num_outputs} are asked for. "
            "Give a head for these, or none."
        )


@torch.no_grad()
def original_size_metrics(
    task: Task, head: nn.Linear, features: StoredFeatures, images: LabelledImages, resolution
) -> dict:
    """Compute segmentation's metrics at the size that each mask has in its file."""
    device = process_state().device
    rows, resized, head = [], torch.empty(1, *resolution), copy.deepcopy(head).to(device)
    for batch in features.batches(1, share=True):
        target = torch.from_numpy(images.target(int(batch["image_id"])))[None].to(device)
        logits = task.logits(head, batch["features"].to(device), resized)
        rows.append(task.statistics(task.predict(logits, target), target))
    return compute_over_processes(task.metric(keep_in_memory=True), rows)

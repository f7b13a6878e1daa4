"""A grid of linear heads on frozen features: trained side by side, one of them selected."""

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from transformers import PreTrainedModel, set_seed

from ..loop.arguments import LoopArguments
from ..loop.fit import Validation, fit
from ..loop.log import read_log
from ..loop.scalars import StepResult
from ..metrics import compute_over_processes
from ..runs.processes import process_state
from ..tasks.task import Task
from .arguments import ProbeArguments
from .features import Features, backbone_features


class Candidate(NamedTuple):
    """A head of the grid."""

    learning_rate: float
    pooling: str

    def __str__(self) -> str:
        return f"{self.learning_rate:g} {self.pooling}"


def head_grid(
    recipe: ProbeArguments, loop: LoopArguments, task: Task | type[Task]
) -> list[Candidate]:
    """Return the grid of heads of a recipe; a head that is judged without training is no grid.

    Raises:
        ValueError: a pooling that the task doesn't have, or an optimiser of blocks.
    """
    if loop.optimizer == "muon":
        raise ValueError("--optimizer muon is for blocks; linear heads learn by adamw.")
    poolings = recipe.poolings or task.poolings[:1]
    unknown = set(poolings) - set(task.poolings)
    if unknown:
        raise ValueError(
            f"poolings of {task.name} are {', '.join(task.poolings)}; got {sorted(unknown)}."
        )
    factors = [1.0] if loop.steps == 0 else recipe.learning_rate_grid
    return [Candidate(f * loop.learning_rate, pooling) for pooling in poolings for f in factors]


class ProbeHeads(nn.Module):
    """The heads of a grid on the same features.

    A head on some tokens alone has zeros for weights of the others, from start to end.

    Args:
        start: a head that all of them start from; default: zeros.
    """

    def __init__(self, task: Task, candidates: list[Candidate], start: nn.Linear | None = None):
        super().__init__()
        self.task = task
        self.heads = nn.ModuleList()
        self.masks = []
        for candidate in candidates:
            head = nn.Linear(task.head_width(task.config), task.num_outputs)
            mask = None
            if candidate.pooling != task.poolings[0]:
                cls = torch.arange(head.in_features) < task.config.hidden_size
                mask = (cls if candidate.pooling == "cls" else ~cls).float()
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            if start is not None:
                head.load_state_dict(start.state_dict())
            if mask is not None:
                head.weight.data *= mask
            self.heads.append(head)
            self.masks.append(mask)

    def forward(self, features: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
        """Return the loss of every head."""
        losses = []
        for head, mask in zip(self.heads, self.masks, strict=True):
            seen = features if mask is None else features * mask.to(features.device)
            if self.task.dense and len(self.heads) > 1:
                # logits at every pixel are large: only those of one head at a time stay in memory
                losses.append(checkpoint(self._loss, head, seen, target, use_reentrant=False))
            else:
                losses.append(self._loss(head, seen, target))
        return losses

    def _loss(self, head: nn.Linear, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the loss of one head."""
        return self.task.loss(self.task.logits(head, features, target), target)


@dataclass
class Probe:
    """A trained head and its figures.

    Args:
        metrics: on the validation images, after the last epoch.
        best_on_validation: the best `epoch`, and the scalar `metrics` after it.
        selected: learning rate and pooling of the head, and its loss on the images that select
            (None without a grid).
    """

    head: nn.Linear
    metrics: dict
    best_on_validation: dict
    selected: dict


def train_heads(
    task: Task,
    train: Dataset,
    selection: Features | None,
    validation: Features,
    recipe: ProbeArguments,
    loop: LoopArguments,
    *,
    backbone: PreTrainedModel | None = None,
    start: nn.Linear | None = None,
) -> Probe:
    """Train the heads of a grid side by side, select one, and judge it.

    Args:
        train: `Features`, or images in random views that the backbone sees in every step.
        selection: training images that no head learns from; the head with the smallest loss on them
            is selected. None without a grid.
        loop: its `steps` may be None: as many as the recipe's epochs have.
        start: a head that all of them start from; default: zeros.
    """
    # a) an epoch of a small dataset is one batch
    set_seed(loop.seed)
    candidates = head_grid(recipe, loop, task)
    heads = ProbeHeads(task, candidates, start)
    batch_size = min(loop.batch_size, len(train))
    epoch_steps = len(train) / batch_size
    steps = math.ceil(recipe.epochs * epoch_steps) if loop.steps is None else loop.steps
    loop = dataclasses.replace(loop, steps=steps, batch_size=batch_size)

    def compute_loss(module, batch, progress):
        features = batch.get("features")
        if features is None:
            features = backbone_features(backbone, task, batch["pixel_values"])
        losses = module(features, batch["target"])
        named = {f"loss/{c}": loss for c, loss in zip(candidates, losses, strict=True)}
        # the sum: each head learns as if it were alone
        return StepResult(sum(losses), named)

    def validate():
        scalars = {}
        for candidate, head in zip(candidates, heads.heads, strict=True):
            scores = score_head(task, head, validation, recipe.eval_batch_size)
            for name, value in scores.items():
                if isinstance(value, float):
                    scalars[f"{candidate}/{name}"] = value
        return scalars

    # b) train; each head has its own rate and its gradients are clipped by themselves
    groups = [
        {"params": list(head.parameters()), "lr": candidate.learning_rate}
        for head, candidate in zip(heads.heads, candidates, strict=True)
    ]
    every = max(1, round(recipe.validate_epochs * epoch_steps))
    validation_steps = Validation(validate, every)
    fit(
        heads, train, compute_loss, loop,
        groups=groups, new_views=True, validation=validation_steps,
    )  # fmt: skip

    # c) select on images that no head has seen, judge on those of another split
    number, loss = 0, None
    if selection is not None:
        losses = _selection_losses(heads, selection, recipe.eval_batch_size)
        number = int(np.nanargmin(losses))
        loss = losses[number]
    candidate, head = candidates[number], heads.heads[number]
    process_state().wait_for_everyone()  # until the log is written
    return Probe(
        copy.deepcopy(head).cpu(),
        score_head(task, head, validation, recipe.eval_batch_size),
        best_epoch(task, read_log(loop.output_dir), candidate, epoch_steps),
        {**candidate._asdict(), "selection_loss": loss},
    )


@torch.no_grad()
def score_head(task: Task, head: nn.Linear, features: Features, batch_size: int) -> dict:
    """Return the metric of a head; the processes share the images."""
    device, rows = process_state().device, []
    for batch in features.batches(batch_size):
        target = batch["target"].to(device)
        logits = task.logits(head, batch["features"].to(device), target)
        rows.append(task.statistics(task.predict(logits, target), target))
    return compute_over_processes(task.metric, rows)


@torch.no_grad()
def _selection_losses(heads: ProbeHeads, features: Features, batch_size: int) -> list[float]:
    """Return the mean loss of every head over some images: finer than a score."""
    device, rows = process_state().device, []
    for batch in features.batches(batch_size):
        target = batch["target"].to(device)
        losses = torch.stack(heads(batch["features"].to(device), target))
        rows.append((len(target), losses.cpu().double().numpy()))
    rows = gather_object(rows)
    total = sum(number for number, _ in rows)
    return (sum(number * losses for number, losses in rows) / total).tolist()


def best_epoch(task: Task, log: list[dict], candidate: Candidate, epoch_steps: float) -> dict:
    """Return the `epoch` with a head's best score on validation, and the `metrics` after it."""
    prefix = f"{candidate}/"
    validations = [line for line in log if f"{prefix}{task.score}" in line]
    best = validations[task.best([line[f"{prefix}{task.score}"] for line in validations])]
    metrics = {k.removeprefix(prefix): v for k, v in best.items() if k.startswith(prefix)}
    return {"epoch": max(1, round(best["step"] / epoch_steps)), "metrics": metrics}

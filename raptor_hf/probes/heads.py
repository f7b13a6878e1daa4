"""A grid of linear heads on frozen features: trained side by side, one of them selected."""

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from transformers import PreTrainedModel, set_seed

from ..data import batches
from ..loop.arguments import LoopArguments
from ..loop.fit import fit
from ..loop.scalars import StepResult
from ..runs.processes import process_state
from ..tasks.task import Task
from .arguments import ProbeArguments
from .features import Features, backbone_features


class Candidate(NamedTuple):
    """A head of the grid."""

    learning_rate: float
    pooling: str


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
    factors = [1.0] if loop.steps == 0 else recipe.learning_rate_grid or [1.0]
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
        for candidate in candidates:
            # zeros, or the given head
            head = nn.Linear(task.head_width(task.config), task.num_outputs)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            if start is not None:
                head.load_state_dict(start.state_dict())
            # of some tokens alone: neither weights nor gradients for the others
            if candidate.pooling != task.poolings[0]:
                cls = torch.arange(head.in_features) < task.config.hidden_size
                seen = (cls if candidate.pooling == "cls" else ~cls).float()
                head.weight.data *= seen
                head.weight.register_hook(lambda grad, seen=seen: grad * seen.to(grad.device))
            self.heads.append(head)

    def forward(self, features: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
        """Return the loss of every head."""
        compute = self._loss
        if self.task.dense and len(self.heads) > 1:
            # logits at every pixel are large: only those of one head at a time stay in memory
            compute = partial(checkpoint, self._loss, use_reentrant=False)
        return [compute(head, features, target) for head in self.heads]

    def _loss(self, head: nn.Linear, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the loss of one head."""
        return self.task.loss(self.task.logits(head, features, target), target)


def train_heads(
    task: Task,
    train: Dataset,
    selection: Features | None,
    recipe: ProbeArguments,
    loop: LoopArguments,
    *,
    backbone: PreTrainedModel | None = None,
    start: nn.Linear | None = None,
) -> tuple[nn.Linear, dict]:
    """Train the heads of a recipe side by side and select one.

    Args:
        task: of the heads.
        train: features, or images in random views, from which `backbone` makes features.
        selection: training images that no head learns from; the head with the smallest loss on them
            is selected. None without a grid.
        loop: its `steps` may be None: as many as the recipe's epochs have.
        start: a head that all of them start from; default: zeros.

    Returns:
        The selected head, and its `learning_rate`, `pooling` and `selection_loss`.
    """
    # a) an epoch of a small dataset is one batch
    set_seed(loop.seed)
    candidates = head_grid(recipe, loop, task)
    names = [f"loss/{rate:g} {pooling}" for rate, pooling in candidates]
    heads = ProbeHeads(task, candidates, start)
    batch_size, steps = min(loop.batch_size, len(train)), loop.steps
    if steps is None:
        steps = math.ceil(recipe.epochs * len(train) / batch_size)
    loop = dataclasses.replace(loop, steps=steps, batch_size=batch_size)

    def compute_loss(module, batch, progress):
        features = batch.get("features")
        if features is None:
            features = backbone_features(backbone, task, batch["pixel_values"])
        losses = module(features, batch["target"])
        # the sum: each head learns as if it were alone
        return StepResult(sum(losses), dict(zip(names, losses, strict=True)))

    # b) train; each head has its own rate and its gradients are clipped by themselves
    groups = []
    for head, candidate in zip(heads.heads, candidates, strict=True):
        groups.append({"params": list(head.parameters()), "lr": candidate.learning_rate})
    fit(heads, train, compute_loss, loop, groups=groups, new_views=True)

    # c) select on images that no head has seen
    number, loss = 0, None
    if selection is not None:
        losses = _selection_losses(heads, selection, recipe.eval_batch_size)
        number = int(np.nanargmin(losses))
        loss = losses[number]
    return heads.heads[number], {**candidates[number]._asdict(), "selection_loss": loss}


@torch.no_grad()
def _selection_losses(heads: ProbeHeads, features: Features, batch_size: int) -> list[float]:
    """Return the mean loss of every head over some images: finer than a score."""
    device, rows = process_state().device, []
    for batch in batches(features, batch_size, None):
        target = batch["target"].to(device)
        losses = torch.stack(heads(batch["features"].to(device), target))
        rows.append((len(target), losses.cpu().double().numpy()))
    numbers, losses = zip(*gather_object(rows), strict=True)
    return np.average(losses, axis=0, weights=numbers).tolist()

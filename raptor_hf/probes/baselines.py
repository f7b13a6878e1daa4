"""Baselines without training: a vote of the nearest images, and the best constant answer."""

import math

import torch
from torch import nn

from ..metrics import Accuracy, compute_over_processes, label_ranks
from ..runs.processes import process_state
from ..tasks.task import Classification, Task
from .features import Features

NEIGHBOUR_IMAGES = 100_000  # training images that vote, at most
_KEYS_AT_ONCE = 4096


@torch.no_grad()
def nearest_neighbours(
    train: Features,
    validation: Features,
    task: Classification,
    *,
    neighbours: int = 20,
    temperature: float = 0.07,
) -> dict[str, float]:
    """Return accuracy of a vote of the nearest training images, by the cosine of the cls tokens.

    Families without a cls token have the mean of the patches in its place. Weights are
    exp(cosine / temperature) (DINO, arXiv 2104.14294): nothing is trained.
    """
    size, device = task.config.hidden_size, process_state().device

    def image_tokens(batch: dict) -> torch.Tensor:
        return nn.functional.normalize(batch["features"][:, :size].to(device), dim=1)

    # every process needs the tokens and labels of the training images
    keys, labels = [], []
    every = math.ceil(len(train) / NEIGHBOUR_IMAGES)
    for rows in torch.arange(0, len(train), every).split(_KEYS_AT_ONCE):
        batch = train.__getitems__(rows.tolist())
        keys.append(image_tokens(batch))
        labels.append(batch["target"].to(device))
    keys, labels = torch.cat(keys), torch.cat(labels)

    # the processes share the validation images
    statistics = []
    for batch in validation.batches(256):
        similarity, index = (image_tokens(batch) @ keys.mT).topk(min(neighbours, len(keys)), dim=1)
        votes = torch.zeros(len(index), task.num_outputs, device=device)
        votes.scatter_add_(1, labels[index], (similarity / temperature).exp())
        statistics.append(label_ranks(logits=votes, labels=batch["target"].to(device)))
    return compute_over_processes(Accuracy, statistics)


def constant_metrics(task: Task, answer: torch.Tensor, validation: Features) -> dict:
    """Return the metric of a constant answer (`Task.constant`), which looks at no image."""
    statistics = []
    for batch in validation.batches(64):
        prediction = answer.expand(*batch["target"].shape, *answer.shape)
        statistics.append(task.statistics(prediction, batch["target"]))
    return compute_over_processes(task.metric, statistics)

"""What needs no training: a vote of the nearest images, and the best constant answer."""

import numpy as np
import torch
from torch import nn

from ..metrics import Accuracy, compute_over_processes, label_ranks
from ..runs.processes import process_state
from ..tasks.labelled_images import LabelledImages
from ..tasks.task import Classification, Task
from .datasets import choose
from .features import StoredFeatures


@torch.no_grad()
def nearest_neighbours(
    train: StoredFeatures,
    test: StoredFeatures,
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

    def image_tokens(batch):
        return nn.functional.normalize(batch["features"][:, :size].to(device), dim=1)

    batches = list(train.batches(4096))
    keys = torch.cat([image_tokens(batch) for batch in batches])
    labels = torch.cat([batch["target"] for batch in batches]).to(device)
    rows = []
    for batch in test.batches(256, share=True):
        similarity, index = (image_tokens(batch) @ keys.mT).topk(min(neighbours, len(keys)), dim=1)
        votes = torch.zeros(len(index), task.num_outputs, device=device)
        votes.scatter_add_(1, labels[index], (similarity / temperature).exp())
        rows.append(label_ranks(logits=votes, labels=batch["target"].to(device)))
    return compute_over_processes(Accuracy(keep_in_memory=True), rows)


def constant_metrics(
    task: Task,
    train: LabelledImages,
    validation: StoredFeatures,
    *,
    num_images: int = 1000,
    skip_corrupt: int = 0,
) -> dict:
    """Return what the best constant answer scores: the baseline that looks at no image.

    Args:
        num_images: training targets that it is read off, at most.
    """
    rows = choose(len(train), num_images, 0)
    targets = []
    for row in np.sort(rows).tolist():
        try:
            targets.append(train.target(row))
        except ValueError:
            if not skip_corrupt:  # else the images have been counted already
                raise
    answer = task.constant(targets)
    rows = []
    for batch in validation.batches(64, share=True):
        prediction = answer.expand(*batch["target"].shape, *answer.shape)
        rows.append(task.statistics(prediction, batch["target"]))
    return compute_over_processes(task.metric(keep_in_memory=True), rows)

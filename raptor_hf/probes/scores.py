"""Scores of predictions: of a head, of the nearest images, and of a constant answer.

A prediction is a function of a batch of features and a target, whose size it has.
"""

from collections.abc import Callable

import torch
from accelerate.utils import send_to_device
from torch import nn

from ..data import batches
from ..metrics import compute_over_processes
from ..runs.processes import process_state
from ..tasks.labelled_images import LabelledImages
from ..tasks.task import Classification, Task
from .features import Features

_KEYS_AT_ONCE = 4096

Predict = Callable[[dict, torch.Tensor], torch.Tensor]


@torch.no_grad()
def score(
    task: Task,
    features: Features,
    predict: Predict,
    batch_size: int = 64,
    original: LabelledImages | None = None,
) -> dict:
    """Return the metric of predictions; the processes share the images.

    Args:
        original: images with the targets that count, each of its own size; default: the targets
            that lie beside the features.
    """
    device, rows = process_state().device, []
    for batch in batches(features, 1 if original else batch_size, None):
        batch = send_to_device(batch, device)
        target = batch["target"]
        if original:
            target = torch.from_numpy(original.target(int(batch["image_id"])))[None].to(device)
        rows.append(task.statistics(predict(batch, target), target))
    return compute_over_processes(task.metric, rows)


def predict_by_head(task: Task, head: nn.Linear) -> Predict:
    """Return the predictions of a linear head."""
    return lambda batch, target: task.predict(
        task.logits(head, batch["features"], batch["target"]), target
    )


def predict_constant(answer: torch.Tensor) -> Predict:
    """Return the same answer (`Task.constant`) for every image, without looking at it."""
    return lambda batch, target: answer.to(target.device).expand(*target.shape, *answer.shape)


@torch.no_grad()
def predict_by_neighbours(
    train: Features, task: Classification, *, neighbours: int = 20, temperature: float = 0.07
) -> Predict:
    """Return votes of the nearest training images, by the cosine of the cls tokens.

    Families without a cls token have the mean of the patches in its place. Weights are
    exp(cosine / temperature) (DINO, arXiv 2104.14294): nothing is trained.
    """
    device = process_state().device

    def image_tokens(batch: dict) -> torch.Tensor:
        return nn.functional.normalize(batch["features"][:, : task.config.hidden_size], dim=1)

    # every process needs the tokens and labels of the training images
    keys, labels = [], []
    for rows in torch.arange(len(train)).split(_KEYS_AT_ONCE):
        batch = send_to_device(train.__getitems__(rows.tolist()), device)
        keys.append(image_tokens(batch))
        labels.append(batch["target"])
    keys, labels = torch.cat(keys), torch.cat(labels)

    def predict(batch: dict, target: torch.Tensor) -> torch.Tensor:
        similarity, index = (image_tokens(batch) @ keys.mT).topk(min(neighbours, len(keys)), dim=1)
        votes = torch.zeros(len(index), task.num_outputs, device=device)
        return votes.scatter_add_(1, labels[index], (similarity / temperature).exp())

    return predict

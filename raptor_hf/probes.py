"""How good a frozen backbone is: a linear probe, and how well it follows its teacher.

Teacher and Raptor go through the same code: nothing here asks which of the two it holds.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, set_seed

from .configuration_raptor import teacher_family, token_layout
from .data import ImageViews
from .loop import LoopArguments, fit
from .metrics import Accuracy, RSquared, label_ranks, r2_reference, state_statistics
from .modeling_raptor import pool_tokens
from .runs import progress_bar
from .teachers import trajectory


class FeatureDataset(Dataset):
    """Image features that were computed once: `features` (n, F) and `label` (n,)."""

    def __init__(self, features: torch.Tensor, labels: torch.Tensor):
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """A batch of features and labels."""
        return {"features": self.features[rows], "label": self.labels[rows]}


def image_batches(images: ImageViews, batch_size: int, description: str) -> Iterator[dict]:
    """All rows of an image dataset in order, the last batch as ragged as it comes."""
    with progress_bar(description, len(images), unit="image") as bar:
        for start in range(0, len(images), batch_size):
            rows = list(range(start, min(start + batch_size, len(images))))
            yield images.__getitems__(rows)
            bar.update(len(rows))


@torch.no_grad()
def extract_features(
    model: PreTrainedModel, images: ImageViews, *, batch_size: int = 64
) -> FeatureDataset:
    """[cls, mean of patches] after the final norm, for every image: features (n, 2·D)."""
    features, labels = [], []
    for batch in image_batches(images, batch_size, "features"):
        outputs = model(batch["pixel_values"].to(model.device), output_hidden_states=False)
        features.append(pool_tokens(outputs.last_hidden_state, model.config).cpu())
        labels.append(batch["label"])
    return FeatureDataset(torch.cat(features), torch.cat(labels))


def train_linear_probe(
    features: FeatureDataset,
    num_classes: int,
    arguments: LoopArguments,
    *,
    head: nn.Linear | None = None,
) -> nn.Linear:
    """A linear classifier on frozen features, trained with cross-entropy.

    Args:
        head: what it starts from (`load_linear_head`), with 0 steps what it is; default: zeros.

    Raises:
        ValueError: a head for another number of classes.
    """
    set_seed(arguments.seed)
    probe = nn.Linear(features.features.shape[1], num_classes)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    if head is not None:
        if head.out_features != num_classes:
            raise ValueError(
                f"The head has {head.out_features} classes, but the dataset has {num_classes}. "
                "Give a head for these classes, or none."
            )
        probe.load_state_dict(head.state_dict())

    def compute_loss(module, batch, progress):
        logits = module(batch["features"])
        return nn.functional.cross_entropy(logits, batch["label"]), {}

    return fit(probe, features, compute_loss, arguments, description="probe").cpu()


@torch.no_grad()
def probe_accuracy(probe: nn.Linear, features: FeatureDataset) -> float:
    """Top-1 accuracy of a probe, in [0, 1]."""
    metric = Accuracy(keep_in_memory=True)
    logits = probe(features.features)
    return metric.compute(**label_ranks(logits=logits, labels=features.labels))["accuracy"]


def trajectory_r2(
    student: PreTrainedModel, teacher: PreTrainedModel, images: ImageViews, *, batch_size: int = 64
) -> dict:
    """R² of a student's states against its teacher's, by two definitions.

    Returns:
        `layers` and `mean` of `RSquared`, and `reference`: the mean of `r2_reference` over batches.
    """
    metric, reference = RSquared(keep_in_memory=True), 0.0
    groups = token_layout(teacher.config).groups()
    for batch in image_batches(images, batch_size, "R²"):
        pixel_values = batch["pixel_values"].to(teacher.device)
        states = {
            "prediction": trajectory(student, pixel_values),
            "target": trajectory(teacher, pixel_values),
        }
        metric.add_batch(**state_statistics(**states, groups=groups))
        reference += len(pixel_values) / len(images) * r2_reference(**states)
    return {**metric.compute(), "reference": reference}


def model_facts(model: PreTrainedModel) -> dict:
    """Phases (None for a teacher) and the parameters of the blocks or of the teacher's layers."""
    phases = getattr(model.config, "phases", None)
    layers = model.blocks if phases else model.get_submodule(teacher_family(model.config).layers)
    return {
        "phases": phases,
        "block_parameters": sum(parameter.numel() for parameter in layers.parameters()),
    }

"""Linear heads: published by DINOv2, or of saved models; and Raptors with a head."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig

from ..modeling_raptor import RaptorForImageClassification, RaptorModel, RaptorPreTrainedModel
from ..weights import check_weight_files, read_head_file
from .task import Classification, Task


def load_linear_head(
    source: str | Path, *, hidden_size: int, task: type[Task] = Classification
) -> tuple[nn.Linear, list[str] | None]:
    """Return the linear head of a task, and the names of its classes.

    For classification DINOv2's own heads and the classifiers of transformers' Dinov2 models put
    the features in the same order, cls before the mean of the patches, and leave registers out.

    Args:
        source: DINOv2's `dinov2_vit*_linear_head.pth` or a `.safetensors` file, with `weight`
            (classes, 2·D) and `bias` (classes,), or a folder or Hub id of a model of transformers
            with such a head (a Raptor; for classification DINOv2 too).
        hidden_size: D of the backbone that the head is for.
        task: segmentation has heads (classes, D), depth (bins, 2·D).

    Returns:
        The head in float32, and its class names where the source has them.

    Raises:
        ValueError: a source that is no such head, or a head for another width.
        OSError: no such file, folder or model.
    """
    names = None
    if Path(source).suffix in (".pth", ".pt", ".safetensors") and not Path(source).is_file():
        raise FileNotFoundError(f"{source}: no such head file.")
    if Path(source).is_file():
        weights = read_head_file(Path(source))
    else:
        weights, names = _read_classifier(str(source), task)
    weight, bias = weights["weight"], weights["bias"]
    width = task.head_width(hidden_size)
    if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{source}: expected a head with weight (classes, {width}) and bias "
            f"(classes,) for a backbone of {hidden_size} channels; got {tuple(weight.shape)} and "
            f"{tuple(bias.shape)}. Use the head of this backbone's size."
        )
    head = nn.Linear(weight.shape[1], weight.shape[0])
    head.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return head.requires_grad_(False), names


def _read_classifier(
    name_or_path: str, task: type[Task]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return weights and class names of the linear head of a saved model."""
    config = AutoConfig.from_pretrained(name_or_path)
    if config.model_type not in task.head_types:
        raise ValueError(
            f"{name_or_path}: expected a {task.name} model on {' and '.join(task.looks_at)}, of "
            f"the type {', '.join(task.head_types)}; got {config.model_type}, whose head reads "
            "other features."
        )
    if config.model_type == "raptor" and config.architectures != [task.model_class.__name__]:
        raise ValueError(
            f"{name_or_path} holds {config.architectures}, not a {task.name} head "
            f"({task.model_class.__name__})."
        )
    check_weight_files(name_or_path, config)
    model, loaded = task.auto_class.from_pretrained(
        name_or_path, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    if not isinstance(getattr(model, "classifier", None), nn.Linear) or loaded["missing_keys"]:
        raise ValueError(
            f"{name_or_path} has no trained linear classifier (missing: "
            f"{sorted(loaded['missing_keys'])[:3]}). Give the folder of such a model, or a "
            "head file."
        )
    return model.classifier.state_dict(), [config.id2label[i] for i in range(config.num_labels)]


def attach_head(
    backbone: RaptorModel,
    head: nn.Linear,
    class_names: list[str] | None = None,
    *,
    model_class: type[RaptorPreTrainedModel] = RaptorForImageClassification,
    **fields,
) -> RaptorPreTrainedModel:
    """Return a Raptor and a linear head as one model for the Auto classes.

    Args:
        class_names: default `LABEL_0`, `LABEL_1`, … as in transformers.
        model_class: `RaptorForSemanticSegmentation`, `RaptorForDepthEstimation`, … .
        fields: of the configuration: `depth_bins`, `min_depth`, `max_depth`.

    Raises:
        ValueError: another number of names than the head has classes.
    """
    config = type(backbone.config).from_dict({**backbone.config.to_dict(), **fields})
    if "depth_bins" not in fields:
        names = class_names or [f"LABEL_{label}" for label in range(head.out_features)]
        if len(names) != head.out_features:
            raise ValueError(f"The head has {head.out_features} classes; got {len(names)} names.")
        config.id2label = dict(enumerate(names))
        config.label2id = {name: label for label, name in enumerate(names)}
    model = model_class(config)
    model.raptor.load_state_dict(backbone.state_dict())
    model.classifier.load_state_dict(head.state_dict())
    return model.eval()

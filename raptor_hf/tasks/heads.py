"""Linear heads: published by DINOv2, or of saved models; and Raptors with a head."""

import re
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from ..modeling_raptor import RaptorModel, RaptorPreTrainedModel
from ..modeling_raptor_heads import RaptorForImageClassification
from ..weights import check_weight_files, load_weights
from .task import Classification, Task

_WORDNET = re.compile(r"n\d{8}")  # how ImageNet calls its folders


def load_linear_head(
    source: str | Path,
    *,
    config: PreTrainedConfig,
    task: type[Task] = Classification,
    class_names: list[str] | None = None,
) -> tuple[nn.Linear, list[str] | None]:
    """Return the linear head of a task, and the names of its classes.

    Args:
        source: DINOv2's `dinov2_vit*_linear_head.pth` or a `.safetensors` file, with `weight`
            (classes, 2·D) and `bias` (classes,), or a folder or Hub id of a model of transformers
            with such a head (a Raptor; for classification DINOv2 too).
        config: of the backbone that the head is for, with D channels.
        task: segmentation has heads (classes, D), depth (bins, 2·D).
        class_names: of the images that it is for, see `arrange_head`.

    Returns:
        The head in float32, and its class names where the source has them.

    Raises:
        ValueError: a source that is no such head, or a head for another width.
        OSError: no such file, folder or model.
    """
    # a file, or a saved model
    names, is_file = None, Path(source).is_file()
    if Path(source).suffix in (".pth", ".pt", ".safetensors") and not is_file:
        raise FileNotFoundError(f"{source}: no such head file.")
    if is_file:
        weights = load_weights(source)
        found = set(weights) if isinstance(weights, dict) else type(weights)
        if found != {"weight", "bias"} or not all(map(torch.is_tensor, weights.values())):
            raise ValueError(f"{source}: a head holds tensors 'weight' and 'bias'; got {found}.")
    else:
        weights, names = _read_classifier(str(source), task)

    # its width tells the backbone that it belongs to
    weight, bias = weights["weight"], weights["bias"]
    width = task.head_width(config)
    if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{source}: expected a head with weight (classes, {width}) and bias "
            f"(classes,) for a backbone of {config.hidden_size} channels; got "
            f"{tuple(weight.shape)} and {tuple(bias.shape)}. Use the head of this backbone's size."
        )
    head = nn.Linear(weight.shape[1], weight.shape[0])
    head.load_state_dict({"weight": weight.float(), "bias": bias.float()})

    # outputs in the order of the images' classes
    if class_names:
        order = arrange_head(head, names, class_names, source=str(source))
        names = names and [names[output] for output in order]
    return head.requires_grad_(False), names


@torch.no_grad()
def arrange_head(
    head: nn.Linear, head_names: list[str] | None, names: list[str], *, source: str
) -> list[int]:
    """Put the outputs of a head, in place, into the order of a dataset's classes; others follow.

    Classes are matched by name where the head has names, in whatever order; classes that are called
    by numbers are the outputs of these numbers. Else, and where the folders of a dataset are
    ImageNet's (n01440764), their number must be that of the outputs.

    Args:
        names: of the classes of the dataset.
        source: of the head, for errors.

    Returns:
        The permutation: new output i was output `order[i]`.

    Raises:
        ValueError: a class that the head has not, or another number of classes; the error names it.
    """
    number = head.out_features
    numbers = list(map(str, range(number)))
    named = bool(head_names) and head_names not in (numbers, [f"LABEL_{n}" for n in numbers])
    numbered = all(map(str.isdecimal, names))

    # numbers are places, but for a head whose own names are these numbers
    if numbered and not (named and set(names) <= set(head_names)):
        names, head_names = [str(int(name)) for name in names], numbers
    elif not named or all(map(_WORDNET.fullmatch, names)):
        if len(names) != number:
            raise ValueError(
                f"{source} has {number} classes and the images have {len(names)}. Give a head for "
                "these classes."
            )
        return list(range(number))

    # of two outputs of one name ("crane") the first has it
    outputs = {name: output for output, name in reversed(list(enumerate(head_names)))}
    unknown = [place for place, name in enumerate(names) if name not in outputs]
    order = [outputs[name] for name in names if name in outputs]
    if unknown or len(set(order)) < len(order):
        examples = ", ".join(repr(names[place]) for place in unknown[:3])
        raise ValueError(
            f"{source} has other classes than the images, of which it lacks {examples or 'none'} "
            f"({len(unknown)} of {len(names)}); its own are {', '.join(head_names[:3])}, …. Give "
            "images of these classes, or a head for those."
        )
    order += sorted(set(range(number)) - set(order))
    head.weight.copy_(head.weight[order])
    head.bias.copy_(head.bias[order])
    return order


def _read_classifier(
    name_or_path: str, task: type[Task]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return weights and class names of the linear head of a saved model."""
    config = AutoConfig.from_pretrained(name_or_path)
    other = config.model_type == "raptor" and config.architectures != [task.model_class.__name__]
    if config.model_type not in task.head_types or other:
        raise ValueError(
            f"{name_or_path} holds {config.model_type} {config.architectures}: expected a model of "
            f"{task.name} of the type {' or '.join(task.head_types)}, whose head reads the same "
            "features."
        )

    # a classifier that is missing in the file would be made anew, at random
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

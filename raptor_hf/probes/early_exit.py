"""Fewer applications: what accuracy a Raptor keeps when it stops early, or skips depths.

Three ways to spend less, each a curve of accuracy against the mean number of applications:

- *angle*: an image stops once an application of the last block turns its cls token by less than an
  angle (`RaptorConfig.exit_angle`), so that easy images cost less than hard ones;
- *spread*: so many applications for all, their depths spread over 1 … L (`num_applications`);
- *first*: all images stop after the same layer.

The Raptor and its head are those that were trained for all L applications.
"""

import torch

from ..configuration_raptor import token_layout
from ..data import batches
from ..modeling_raptor_heads import RaptorForImageClassification, pool_tokens

_ANGLES = [angle / 2 for angle in range(2, 91)]  # degrees
_TOLERANCE = 0.01  # of accuracy


def applications_after_exit(cls: torch.Tensor, angle: float, *, start: int) -> torch.Tensor:
    """Return the applications of images that stop once cls turns by less than an angle.

    Args:
        cls: (B, L + 1, D), the cls token after every layer.
        angle: in degrees.
        start: the layer that the last block starts from.

    Returns:
        (B,), numbers from 1 to L.
    """
    cosine = torch.nn.functional.cosine_similarity(cls[:, :-1], cls[:, 1:], dim=-1)
    settled = cosine > torch.cos(torch.deg2rad(torch.tensor(angle)))
    settled[:, :start] = False
    settled[:, -1] = True
    return settled.int().argmax(dim=1) + 1


@torch.no_grad()
def exit_curves(
    model: RaptorForImageClassification, images: torch.utils.data.Dataset, *, batch_size: int = 64
) -> dict[str, list[dict[str, float]]]:
    """Return accuracy against compute.

    Args:
        images: batches with `pixel_values` and `label` (`ImageViews`).

    Raises:
        ValueError: a model without a cls token.

    Returns:
        For *angle*, *spread* and *first* a list of points: `applications`, the mean over the
        images, `accuracy`, and for *angle* the `angle` in degrees.
    """
    if not token_layout(model.config).num_cls:
        raise ValueError(
            "An image exits early when its cls token stands still, and a "
            f"{model.config.teacher_config.model_type!r} has none."
        )
    depth, (start, _) = model.config.num_hidden_layers, model.config.spans()[-1]
    correct: dict[tuple, float] = {}
    applied: dict[tuple, float] = {}

    def count(key: tuple, hits: torch.Tensor, applications: torch.Tensor | int) -> None:
        correct[key] = correct.get(key, 0.0) + hits.sum().item()
        total = applications.sum().item() if torch.is_tensor(applications) else applications
        applied[key] = applied.get(key, 0.0) + total

    number = 0
    for batch in batches(images, batch_size, "early exit"):
        pixels, label = batch["pixel_values"].to(model.device), batch["label"].to(model.device)
        number += len(label)
        size = tuple(pixels.shape[-2:])
        states = model.raptor.rollout(model.raptor.embed(pixels), image_size=size)
        hits = torch.stack([predict(model, s) == label for s in states.unbind(1)], dim=1)
        for layer in range(1, depth + 1):
            count(("first", layer), hits[:, layer], layer * len(label))
        for angle in _ANGLES:
            layers = applications_after_exit(states[:, :, 0], angle, start=start)
            count(("angle", angle), hits.gather(1, layers[:, None]), layers)
        for applications in range(1, depth + 1):
            predicted = _spread_prediction(model, pixels, applications)
            count(("spread", applications), predicted == label, applications * len(label))
    curves: dict[str, list] = {"angle": [], "spread": [], "first": []}
    for kind, value in correct:
        point = {
            "applications": applied[kind, value] / number,
            "accuracy": correct[kind, value] / number,
        }
        curves[kind].append(point | ({"angle": value} if kind == "angle" else {}))
    return curves


def predict(model: RaptorForImageClassification, states: torch.Tensor) -> torch.Tensor:
    """Return the classes (B,) that the head makes of states (B, N, D)."""
    features = pool_tokens(model.raptor.norm(states), model.config)
    return model.classifier(features).argmax(dim=-1)


def _spread_prediction(
    model: RaptorForImageClassification, pixel_values: torch.Tensor, applications: int
) -> torch.Tensor:
    """Return the classes (B,) after so many applications."""
    before = model.config.num_applications
    model.config.num_applications = applications
    try:
        return model(pixel_values, output_hidden_states=False).logits.argmax(dim=-1)
    finally:
        model.config.num_applications = before


def cheapest(points: list[dict[str, float]], *, tolerance: float = _TOLERANCE) -> int:
    """Return which point of a curve spends least and loses at most so much accuracy.

    What is lost counts from the point with the most applications.
    """
    full = max(points, key=lambda point: point["applications"])["accuracy"]
    good = [n for n, point in enumerate(points) if point["accuracy"] >= full - tolerance]
    return min(good, key=lambda n: points[n]["applications"])


def evaluate_early_exit(
    model: RaptorForImageClassification,
    chosen_on: torch.utils.data.Dataset,
    images: torch.utils.data.Dataset,
) -> dict:
    """Return the curves on some images, and what is saved at no more than 1 % of accuracy lost.

    Args:
        chosen_on: other images, which the angle and the numbers of applications are chosen on.

    Returns:
        `curves`, and `chosen`: for each kind of curve the chosen point with `saved`, the share of
        applications, and `lost`, the accuracy that it costs on `images`.
    """
    trained, curves = exit_curves(model, chosen_on), exit_curves(model, images)
    depth, choices = model.config.num_hidden_layers, {}
    for kind, points in curves.items():
        point = points[cheapest(trained[kind])]
        full = max(points, key=lambda p: p["applications"])["accuracy"]
        saved, lost = 1 - point["applications"] / depth, full - point["accuracy"]
        choices[kind] = {**point, "saved": saved, "lost": lost}
    return {"curves": curves, "chosen": choices}

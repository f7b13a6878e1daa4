"""How far a student's states are from its teacher's: ε of the ε-block-recurrence hypothesis.

ε is the mean over images of the Frobenius norm of the difference, for every layer (arXiv
2512.19941, §2). The paper asks for one number; a number needs a measure, so there are three.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from raptor_hf.configuration_raptor import TokenLayout, token_layout
from raptor_hf.distillation.rollout import Span, rollout
from raptor_hf.metrics import RSquared, compute_over_processes, state_statistics
from raptor_hf.modeling_raptor import rotary_angles
from raptor_hf.modeling_raptor_heads import pool_tokens
from raptor_hf.teachers import final_norm

_IMAGES_AT_ONCE = 64


def state_sizes(states: torch.Tensor, layout: TokenLayout) -> dict[str, dict[str, list[float]]]:
    """Return how large a teacher's states (n, S, N, D) are, by token group and layer.

    Returns:
        `norm`: the mean over images of the Frobenius norm of a group's tokens; `spread`: the root
        of the mean square of their distance from the channels' means over images and tokens.
        `all` holds every token.
    """
    sizes: dict[str, dict[str, list[float]]] = {"norm": {}, "spread": {}}
    squares, spreads = 0.0, 0.0
    for name, tokens in layout.groups().items():
        part = states[:, :, tokens].double()
        centred = part - part.mean(dim=(0, 2), keepdim=True)
        square, spread = part.square().sum(dim=(2, 3)), centred.square().sum(dim=(2, 3)).mean(0)
        sizes["norm"][name] = square.sqrt().mean(dim=0).tolist()
        sizes["spread"][name] = spread.sqrt().tolist()
        squares, spreads = squares + square, spreads + spread
    sizes["norm"]["all"] = squares.sqrt().mean(dim=0).tolist()
    sizes["spread"]["all"] = spreads.sqrt().tolist()
    return sizes


@torch.no_grad()
def measure_gap(
    spans: list[Span], teacher: PreTrainedModel, states: torch.Tensor, image_size: tuple[int, int]
) -> tuple[dict, torch.Tensor]:
    """Measure how far spans, rolled out from the first state, are from a teacher's states.

    Args:
        states: (n, S + 1, N, D), those that the spans start from and make.
        image_size: height and width of the images in pixels.

    Returns:
        A dict of: `absolute`, by token group a list over the S layers: ε = mean of ‖f − R‖_F;
        `relative`: that over the mean of ‖f‖_F; `to_spread`: over the spread (`state_sizes`), what
        is 1 for the best constant answer; `r2` as `RSquared` gives it (`layers`, `mean`).
        And the last predicted state, (n, N, D).
    """
    layout = token_layout(teacher.config)
    groups, angles = layout.groups(), rotary_angles(teacher, image_size)
    rows, norms, last = [], [], []
    for target in states.split(_IMAGES_AT_ONCE):
        prediction = rollout(spans, target, resets={spans[0].start}, angles=angles)
        whole = torch.cat([target[:, :1], prediction], dim=1)
        rows.append(state_statistics(prediction=whole, target=target, groups=groups))
        error = (whole - target)[:, 1:].double().square().sum(dim=-1)
        by_group = {name: error[..., tokens].sum(dim=-1) for name, tokens in groups.items()}
        norms.append({**by_group, "all": error.sum(dim=-1)})
        last.append(prediction[:, -1])
    sizes = state_sizes(states[:, 1:], layout)
    absolute = {
        name: torch.cat([part[name] for part in norms]).sqrt().mean(dim=0) for name in norms[0]
    }
    result = {"absolute": {name: error.tolist() for name, error in absolute.items()}}
    for name, size in (("relative", "norm"), ("to_spread", "spread")):
        result[name] = {
            group: (error.cpu() / torch.tensor(sizes[size][group])).tolist()
            for group, error in absolute.items()
        }
    result["r2"] = compute_over_processes(RSquared(keep_in_memory=True), rows)
    return result, torch.cat(last)


@torch.no_grad()
def judge_classes(
    teacher: PreTrainedModel, head: nn.Linear, last: torch.Tensor, labels: torch.Tensor
) -> float:
    """Return the accuracy of a teacher's head, final norm before it, on states (n, N, D)."""
    predicted = head(pool_tokens(final_norm(teacher, last), teacher.config)).argmax(dim=-1)
    return float((predicted == labels.to(predicted.device)).double().mean())

"""Networks without learned depth, and predictions of states that need no network.

Whatever an untrained network, or one with its layers in random order, has in common with a teacher
says nothing of what training made of the order of its layers.
"""

import copy
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration_raptor import TokenLayout, teacher_family
from ..metrics import RSquared, compute_over_processes, state_statistics
from ..modeling_raptor import bare_teacher
from .systems import DepthSystem


def untrained(teacher: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Return a network of the teacher's configuration with random weights, frozen."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = bare_teacher(teacher.config, teacher.config.num_hidden_layers)
    return model.to(teacher.device).requires_grad_(False)


def shuffle_layers(teacher: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Return the teacher with its layers in random order; it shares all weights."""
    weights = {id(tensor): tensor for tensor in (*teacher.parameters(), *teacher.buffers())}
    shuffled = copy.deepcopy(teacher, weights)  # a copy of all but the tensors
    path = teacher_family(teacher.config).layers
    layers = shuffled.get_submodule(path)
    order = np.random.default_rng(seed).permutation(len(layers))
    shuffled.set_submodule(path, nn.ModuleList(layers[index] for index in order.tolist()))
    return shuffled


def null_networks(teacher: DepthSystem, number: int, *, seed: int) -> list[DepthSystem]:
    """Return so many networks of each kind, named `untrained 1` … and `shuffled 1` ….

    None of a family whose layers can't be called one by one.
    """
    networks: list[DepthSystem] = []
    if not teacher.can_run_on:
        return networks
    for kind, make in (("untrained", untrained), ("shuffled", shuffle_layers)):
        for draw in range(1, number + 1):
            model = make(teacher.model, seed + draw)
            networks.append(replace(teacher, name=f"{kind} {draw}", model=model))
    return networks


def r2_baselines(
    fitted: torch.Tensor, judged: torch.Tensor, layout: TokenLayout
) -> dict[str, dict]:
    """Compute R² of predictions that know a_0 at most, as a floor for R² of a Raptor.

    Args:
        fitted: states (n, L + 1, N, D) of the images that means and maps are fitted to.
        judged: states (m, L + 1, N, D) of other images.
        layout: token layout of the states.

    Returns:
        `RSquared` of: `constant`, the mean of a layer and token group; `mean of each position`;
        `copy of a_0`; `a_0 + mean update`, of each position; `affine map of a_0`, one a layer and
        token group, by least squares.
    """
    start, groups = judged[:, :1], layout.groups()
    update = (fitted - fitted[:, :1]).mean(dim=0)
    predictions = {
        "constant": torch.zeros_like(judged),
        "mean of each position": fitted.mean(dim=0).expand_as(judged),
        "copy of a_0": start.expand_as(judged),
        "a_0 + mean update": start + update,
        "affine map of a_0": torch.zeros_like(judged),
    }
    for tokens in groups.values():
        part = fitted[:, :, tokens]
        predictions["constant"][:, :, tokens] = part.mean(dim=(0, 2))[:, None]

        # one least squares problem has all layers as its right sides
        before = part[:, 0].flatten(0, 1).double()
        mean, after = before.mean(dim=0), part.transpose(0, 1).flatten(1, 2).double()
        centred, target = before - mean, after.mean(dim=1)
        squares = centred.T @ centred
        products = centred.T @ (after - target[:, None])
        maps = torch.linalg.pinv(squares, hermitian=True) @ products
        mapped = (start[:, :, tokens].double() - mean) @ maps[:, None].transpose(0, 1)
        predictions["affine map of a_0"][:, :, tokens] = (mapped + target[:, None]).float()
    scores = {}
    for name, prediction in predictions.items():
        rows = state_statistics(prediction=prediction, target=judged, groups=groups)
        scores[name] = compute_over_processes(RSquared, [rows])
    return scores

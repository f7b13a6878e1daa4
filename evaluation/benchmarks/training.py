"""Training steps beside the reference's: speed, and what they keep in memory."""

import copy
from collections.abc import Callable, Collection, Iterator
from functools import partial

import torch
from torch import nn

from raptor_hf.loop import configure_compute
from raptor_hf.loop.arguments import ComputeArguments

from .models import RAPTORS, Candidates, rollout_states
from .settings import FORMS
from .speed import Measurement, compare, compile_all, images_a_second, relative, speeds
from .timing import clock_of, matmul_peak, within

_STEPS_A_VISIT = 4  # on a GPU, which is waited for after them, as training never does


def benchmark_train_step(
    size: str,
    batches: list[int],
    rounds: int,
    device: str,
    dtype: torch.dtype,
    forms: Collection[str] = FORMS,
    limit: float = 600.0,
) -> Iterator[Measurement]:
    """Yield the speed of a training step beside the reference, and what it keeps in memory.

    Weights are float32 in any case; another type is what autocast computes in. The reference in
    float32, as it is published, is beside it.

    Args:
        limit: seconds that a form may take at a batch size; else it is left out.
    """
    candidates = Candidates(size, device=device)
    modules = {name: getattr(candidates, name) for name in RAPTORS}
    modules["matched, checkpointed"] = copy.deepcopy(candidates.matched)
    compute = ComputeArguments(gradient_checkpointing=True)
    configure_compute(modules["matched, checkpointed"], compute)
    peak = matmul_peak(device, dtype, rounds)
    yield "TFLOP/s in large products", {"measured": peak / 1e12}
    for batch in batches:
        states = candidates.states(batch)
        with torch.no_grad():
            target = torch.stack(candidates.rollouts()["teacher"](states))
        losses = {
            name: partial(_loss_of, _rollout_of(name, module.train()), states, target, dtype)
            for name, module in modules.items()
        }
        kept = {name: kept_bytes(loss) / batch for name, loss in losses.items()}
        megabytes = {"reference, MB an image": kept["reference"] / 1e6}
        yield f"kept for the backward pass, batch {batch}", relative(kept, "reference") | megabytes
        for form in [form for form in ("plain", "compiled") if form in forms]:
            title = f"training step, batch {batch}, {form}"
            data = (states, target, dtype)
            measure = partial(_compare_steps, title, candidates, modules, form, data, rounds, peak)
            yield from within(limit, title, measure)


def _compare_steps(
    title: str,
    candidates: Candidates,
    modules: dict[str, nn.Module],
    form: str,
    data: tuple[torch.Tensor, torch.Tensor, torch.dtype],
    rounds: int,
    peak: float,
) -> Iterator[Measurement]:
    """Yield the speeds of training steps in one form, on states, target and what is computed in."""
    states, target, dtype = data
    device, error = candidates.device, _squared_error
    many = _STEPS_A_VISIT if device == "cuda" else 1
    if form == "compiled":
        compile_all({name: list(module.blocks) for name, module in modules.items()})
        error = torch.compile(error, dynamic=False)
    steps = {}
    for name, module in modules.items():
        weights = list(module.train().blocks.parameters())
        optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=name != "reference")
        loss = partial(_loss_of, _rollout_of(name, module), states, target, dtype, error)
        steps[name] = partial(step, loss, weights, optimizer, many)
    if form == "plain" and dtype != torch.float32:
        weights = list(modules["reference"].blocks.parameters())
        loss = partial(_loss_of, modules["reference"], states, target, torch.float32)
        optimizer = torch.optim.AdamW(weights, lr=1e-4)
        steps["reference, float32"] = partial(step, loss, weights, optimizer, many)
    clock = clock_of(device)
    first = {}
    for name, call in steps.items():
        start = clock()
        call()
        first[name] = clock() - start
    times = compare(steps, rounds, device)
    times = {name: [seconds / many for seconds in values] for name, values in times.items()}
    yield f"{title}: seconds until it first ran", first
    yield from speeds(title, times)
    yield from images_a_second(title, candidates, times, len(states), peak, passes=3)
    for module in modules.values():
        for block in module.blocks:
            block._compiled_call_impl = None  # there is no public way back


def _rollout_of(name: str, module: nn.Module) -> Callable:
    """Return how a candidate goes from states to all layers."""
    return module if name == "reference" else partial(rollout_states, module)


def _squared_error(trajectory: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean over everything."""
    return (trajectory - target).square().mean()


def _loss_of(
    rollout: Callable,
    states: torch.Tensor,
    target: torch.Tensor,
    dtype: torch.dtype,
    error: Callable = _squared_error,
) -> torch.Tensor:
    """Return the mean squared error over all layers."""
    with torch.autocast(states.device.type, dtype, enabled=dtype != states.dtype):
        trajectory = torch.stack(rollout(states))
    return error(trajectory, target)


def step(
    loss: Callable[[], torch.Tensor],
    weights: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    many: int = 1,
) -> None:
    """Make some optimiser updates."""
    for _ in range(many):
        loss().backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def kept_bytes(work: Callable[[], torch.Tensor]) -> int:
    """Return bytes of all different tensors that autograd keeps for the backward pass, but the
    weights.
    """
    kept: dict[tuple[int, int], int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter) and not _is_view_of_weight(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr(), storage.nbytes()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    del result
    return sum(kept.values())


def _is_view_of_weight(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is a weight in another view."""
    return isinstance(tensor._base, nn.Parameter)

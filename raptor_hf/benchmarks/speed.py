"""Raptors beside the reference's blocks and the teacher's layers: speed, memory, compile time.

What is compared is in `benchmark_models`. Speeds are ratios of one interleaved run: CPU time of all
threads, or CUDA events. Beside them stand what a device does in large matrix products in the same
run, and the share of it that each reaches.
"""

import copy
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
from torch import nn

from ..loop.arguments import ComputeArguments
from ..loop.engine import configure_compute
from .models import RAPTORS, Candidates, rollout_states
from .settings import FORMS
from .timing import PROCESSES, interleaved, median_ratio

_Measurement = tuple[str, dict[str, float]]  # what was measured, and a figure a candidate
_REFERENCE_AGAIN = "reference again"  # it is compared with itself: what a ratio of 1 looks like


def _compare(candidates: dict[str, Callable], rounds: int, device: str) -> dict[str, list[float]]:
    """Return times in seconds, with the reference first; it is measured twice."""
    candidates = {**candidates, _REFERENCE_AGAIN: candidates["reference"]}
    calls = {name: lambda _visit, call=call: call() for name, call in candidates.items()}
    return interleaved(calls, rounds=rounds, clock=_clock_of(device))


def speeds(title: str, times: dict[str, list[float]]) -> Iterator[_Measurement]:
    """Yield speed beside the reference: how many times longer it takes."""
    names = [name for name in times if name != "reference"]
    yield title, {name: median_ratio(times, "reference", name) for name in names}


def _clock_of(device: str) -> Callable[[], float]:
    """Return CPU time of all threads, or when a GPU had done all that it was given; in seconds."""
    if device != "cuda":
        return time.process_time
    start = torch.cuda.Event(enable_timing=True)
    start.record()

    def clock() -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return start.elapsed_time(event) / 1000

    return clock


def _matmul_peak(device: str, dtype: torch.dtype, rounds: int) -> float:
    """Return FLOP a second in products of large square matrices: the best of some."""
    size = 8192 if device == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    products = {"product": lambda _visit: left @ right}
    times = interleaved(products, rounds=4 * rounds, clock=_clock_of(device))
    return 2 * size**3 / min(times["product"])


def images_a_second(
    title: str,
    candidates: Candidates,
    times: dict[str, list[float]],
    batch: int,
    peak: float,
    passes: int,
) -> Iterator[_Measurement]:
    """Yield throughput, and the share of the peak that it reaches.

    Args:
        passes: how much of an image's FLOP are counted: 1 forwards, 3 for a training step.
    """
    flops, throughputs, shares = candidates.flops(), {}, {}
    for name in times:
        if model := next((known for known in flops if name.startswith(known)), None):
            throughputs[name] = batch / statistics.median(times[name])
            shares[name] = passes * flops[model] * throughputs[name] / peak
    yield f"{title}: images a second", throughputs
    yield f"{title}: share of the peak", shares


def benchmark_model(
    size: str,
    batches: list[int],
    rounds: int,
    device: str,
    dtype: torch.dtype,
    forms: Collection[str] = FORMS,
) -> Iterator[_Measurement]:
    """Yield the speed of inference beside the reference: plain, compiled, in int8."""
    candidates = Candidates(size, device=device, dtype=dtype)
    candidates.matched.prepare_for_inference()
    yield "FLOP, times the teacher's", relative(candidates.flops(), "teacher")
    weights = relative(candidates.weight_bytes(), "teacher")
    yield "bytes of the weights, times the teacher's", weights
    peak = _matmul_peak(device, dtype, rounds)
    for form in [form for form in ("plain", "compiled") if form in forms]:
        for batch in batches:
            if form == "compiled":
                _compile_all(candidates.layers())
            states = candidates.states(batch)
            calls = {n: partial(rollout, states) for n, rollout in candidates.rollouts().items()}
            with torch.no_grad():
                times = _compare(calls, rounds, device)
            title = f"inference, batch {batch}, {form}"
            yield from speeds(title, times)
            yield from images_a_second(title, candidates, times, batch, peak, passes=1)
    if "int8" in forms and device == "cpu":
        if importlib.util.find_spec("torchao"):
            yield from _benchmark_int8(size, batches, rounds)
        else:
            print("int8 is left out: it needs the extra int8 (torchao)")
    if "compiled" in forms and device == "cpu":
        block = _in_new_process(_seconds_to_compile, size, False)
        unrolled = _in_new_process(_seconds_to_compile, size, True)
        for part, name in enumerate(("", ", without the C++ compiler")):
            seconds = {"a block": block[part], "all 12 applications": unrolled[part]}
            yield f"seconds to compile{name}", seconds


def relative(values: dict[str, float], name: str) -> dict[str, float]:
    """Return values as multiples of one of them."""
    return {key: value / values[name] for key, value in values.items()}


def _compile_all(layers: dict[str, list[nn.Module]]) -> None:
    """Compile each block and each layer for itself, for one batch size."""
    torch._dynamo.reset()  # of one function it keeps eight forms only
    for parts in layers.values():
        for part in parts:
            part.compile(dynamic=False)


def _benchmark_int8(size: str, batches: list[int], rounds: int) -> Iterator[_Measurement]:
    """Yield the same with int8 weights and activations, compiled, and what that costs in R²."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    candidates = Candidates(size)
    plain = candidates.rollouts()
    with torch.no_grad():
        exact = {n: rollout(candidates.states(1))[-1] for n, rollout in plain.items()}
    quantised = {name: parts for name, parts in candidates.layers().items() if name != "reference"}
    for parts in quantised.values():
        for part in parts:
            quantize_(part, Int8DynamicActivationInt8WeightConfig())
    for batch in batches:
        _compile_all(quantised)
        states = candidates.states(batch)
        calls = {name: partial(rollout, states) for name, rollout in plain.items()}
        with torch.no_grad():
            times = _compare(calls, rounds, "cpu")
        yield from speeds(f"inference, batch {batch}, in int8 beside the reference", times)
    with torch.no_grad():
        expected = {name: plain[name](candidates.states(1))[-1] for name in quantised}
    errors = {
        name: ((states - exact[name]).square().sum() / spread(exact[name])).item()
        for name, states in expected.items()
    }
    yield "1 − R² of int8 after 12 applications", errors


def spread(states: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares around the mean of each channel."""
    return (states - states.mean(dim=(0, 1))).square().sum()


def _in_new_process(work: Callable, *arguments) -> object:
    """Return what a function of a module returns in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=PROCESSES) as pool:
        return pool.submit(work, *arguments).result()


def _seconds_to_compile(size: str, unrolled: bool) -> tuple[float, float]:
    """Return CPU time that it takes to compile a Raptor's blocks, or all its applications as one
    graph.

    Returns:
        In all, and without the C++ compiler. What comes with the first of all compilations, here a
        small block's, is not counted.
    """
    torch.set_num_threads(1)
    torch._inductor.config.force_disable_caches = True
    torch._inductor.config.compile_threads = 1
    small, large = Candidates("digits"), Candidates(size)
    with torch.no_grad():
        small.matched.blocks[0].compile()
        small.matched.advance(small.states(1), 1)
        torch._dynamo.reset()
        run, states = partial(rollout_states, large.matched), large.states(1)
        if unrolled:
            run = torch.compile(run)
        else:
            _compile_all({"matched": list(large.matched.blocks)})
        moments = [os.times()]
        for _ in range(2):  # the second one only runs
            run(states)
            moments.append(os.times())
    own, compiler = ([m.user + m.system for m in moments], [m.children_user for m in moments])
    in_python = (own[1] - own[0]) - (own[2] - own[1])
    return in_python + compiler[1] - compiler[0], in_python


def benchmark_train_step(
    size: str,
    batches: list[int],
    rounds: int,
    device: str,
    dtype: torch.dtype,
    forms: Collection[str] = FORMS,
) -> Iterator[_Measurement]:
    """Yield the speed of a training step beside the reference, and what it keeps in memory.

    Weights are float32 in any case; another type is what autocast computes in.
    """
    candidates = Candidates(size, device=device)
    modules = {name: getattr(candidates, name) for name in RAPTORS}
    modules["matched, checkpointed"] = copy.deepcopy(candidates.matched)
    compute = ComputeArguments(gradient_checkpointing=True)
    configure_compute(modules["matched, checkpointed"], compute)
    peak = _matmul_peak(device, dtype, rounds)
    for batch in batches:
        states = candidates.states(batch)
        with torch.no_grad():
            target = torch.stack(candidates.rollouts()["teacher"](states))
        losses, steps = {}, {}
        for name, module in modules.items():
            rollout = module if name == "reference" else partial(rollout_states, module)
            weights = list(module.train().blocks.parameters())
            optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=name != "reference")
            losses[name] = partial(_loss_of, rollout, states, target, dtype)
            steps[name] = partial(step, losses[name], weights, optimizer)
        kept = {name: kept_bytes(loss) / batch for name, loss in losses.items()}
        megabytes = {"reference, MB an image": kept["reference"] / 1e6}
        yield f"kept for the backward pass, batch {batch}", relative(kept, "reference") | megabytes
        for form in [form for form in ("plain", "compiled") if form in forms]:
            if form == "compiled":
                _compile_all({name: list(module.blocks) for name, module in modules.items()})
            title, times = f"training step, batch {batch}, {form}", _compare(steps, rounds, device)
            yield from speeds(title, times)
            yield from images_a_second(title, candidates, times, batch, peak, passes=3)
        for module in modules.values():
            for block in module.blocks:
                block._compiled_call_impl = None  # there is no public way back


def _loss_of(
    rollout: Callable, states: torch.Tensor, target: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return the mean squared error over all layers."""
    with torch.autocast(states.device.type, dtype, enabled=dtype != states.dtype):
        trajectory = torch.stack(rollout(states))
    return (trajectory - target).square().mean()


def step(
    loss: Callable[[], torch.Tensor],
    weights: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Make one optimiser update."""
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

"""Raptors beside the reference's blocks and the teacher's layers: speed of inference, compile time.

What is compared is in `models`. Speeds are ratios of one interleaved run: CPU time of all
threads, or CUDA events. Beside them stand what a device does in large matrix products in the same
run, and the share of it that each reaches.
"""

import importlib.util
import os
import statistics
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
from torch import nn

from .models import Candidates, rollout_states
from .settings import FORMS
from .timing import PROCESSES, clock_of, interleaved, matmul_peak, median_ratio, within

Measurement = tuple[str, dict[str, float]]  # what was measured, and a figure a candidate
_MODES = {"graphs": "reduce-overhead", "autotuned": "max-autotune-no-cudagraphs"}
_REFERENCE_AGAIN = "reference again"  # it is compared with itself: what a ratio of 1 looks like


def compare(candidates: dict[str, Callable], rounds: int, device: str) -> dict[str, list[float]]:
    """Return times in seconds, with the reference first; it is measured twice."""
    candidates = {**candidates, _REFERENCE_AGAIN: candidates["reference"]}
    calls = {name: lambda _visit, call=call: call() for name, call in candidates.items()}
    return interleaved(calls, rounds=rounds, clock=clock_of(device))


def speeds(title: str, times: dict[str, list[float]]) -> Iterator[Measurement]:
    """Yield speed beside the reference: how many times longer it takes."""
    names = [name for name in times if name != "reference"]
    yield title, {name: median_ratio(times, "reference", name) for name in names}


def images_a_second(
    title: str,
    candidates: Candidates,
    times: dict[str, list[float]],
    batch: int,
    peak: float,
    passes: int,
) -> Iterator[Measurement]:
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
    limit: float = 600.0,
) -> Iterator[Measurement]:
    """Yield the speed of inference beside the reference: plain, compiled, as CUDA graphs, with
    fewer bits.

    Args:
        limit: seconds that a form may take at a batch size; else it is left out.
    """
    candidates = Candidates(size, device=device, dtype=dtype)
    for raptor in (candidates.exact, candidates.matched):
        raptor.eval()
    yield "FLOP, times the teacher's", relative(candidates.flops(), "teacher")
    weights = relative(candidates.weight_bytes(), "teacher")
    yield "bytes of the weights, times the teacher's", weights
    peak = matmul_peak(device, dtype, rounds)
    yield "TFLOP/s in large products", {"measured": peak / 1e12}
    possible = ("plain", "compiled", *(("graphs", "autotuned") if device == "cuda" else ()))
    for form in [form for form in possible if form in forms]:
        for batch in batches:
            title = f"inference, batch {batch}, {form}"
            measure = partial(_compare_form, title, candidates, form, batch, rounds, peak)
            yield from within(limit, title, measure)
    few_bits = "int8" if device == "cpu" else "float8"
    if few_bits in forms:
        if importlib.util.find_spec("torchao"):
            measure = partial(_benchmark_few_bits, size, batches, rounds, device, dtype)
            yield from within(limit, few_bits, measure)
        else:
            print(f"{few_bits} is left out: it needs the extra int8 (torchao)")
    if "compiled" in forms and device == "cpu":
        block = _in_new_process(_seconds_to_compile, size, False)
        unrolled = _in_new_process(_seconds_to_compile, size, True)
        for part, name in enumerate(("", ", without the C++ compiler")):
            seconds = {"a block": block[part], "all 12 applications": unrolled[part]}
            yield f"seconds to compile{name}", seconds


@torch.no_grad()
def _compare_form(
    title: str, candidates: Candidates, form: str, batch: int, rounds: int, peak: float
) -> Iterator[Measurement]:
    """Yield the speeds of one form at one batch size."""
    if form != "plain":
        compile_all(candidates.layers(), mode=_MODES.get(form))
    states = candidates.states(batch)

    def call(rollout: Callable) -> None:
        if form == "graphs":
            torch.compiler.cudagraph_mark_step_begin()
        rollout(states)

    calls = {name: partial(call, rollout) for name, rollout in candidates.rollouts().items()}
    times = compare(calls, rounds, candidates.device)
    yield from speeds(title, times)
    yield from images_a_second(title, candidates, times, batch, peak, passes=1)


def relative(values: dict[str, float], name: str) -> dict[str, float]:
    """Return values as multiples of one of them."""
    return {key: value / values[name] for key, value in values.items()}


def compile_all(layers: dict[str, list[nn.Module]], **options) -> None:
    """Compile each block and each layer for itself, for one batch size."""
    torch._dynamo.reset()  # of one function it keeps eight forms only
    for parts in layers.values():
        for part in parts:
            part.compile(dynamic=False, **options)


@torch.no_grad()
def _benchmark_few_bits(
    size: str, batches: list[int], rounds: int, device: str, dtype: torch.dtype
) -> Iterator[Measurement]:
    """Yield the same with int8 weights and activations, or float8 on a GPU, compiled, and what that
    costs in R².
    """
    from torchao import quantization

    name = "int8" if device == "cpu" else "float8"
    config = (
        quantization.Int8DynamicActivationInt8WeightConfig()
        if device == "cpu"
        else quantization.Float8DynamicActivationFloat8WeightConfig(
            granularity=quantization.PerRow()
        )
    )
    candidates = Candidates(size, device=device, dtype=dtype)
    plain = candidates.rollouts()
    exact = {n: rollout(candidates.states(1))[-1] for n, rollout in plain.items()}
    quantised = {n: parts for n, parts in candidates.layers().items() if n != "reference"}
    for parts in quantised.values():
        for part in parts:
            quantization.quantize_(part, config)
    for batch in batches:
        compile_all(quantised)
        states = candidates.states(batch)
        calls = {n: partial(rollout, states) for n, rollout in plain.items()}
        times = compare(calls, rounds, device)
        yield from speeds(f"inference, batch {batch}, in {name} beside the reference", times)
    found = {n: plain[n](candidates.states(1))[-1] for n in quantised}
    errors = {
        n: ((states - exact[n]).float().square().sum() / spread(exact[n].float())).item()
        for n, states in found.items()
    }
    yield f"1 − R² of {name} after 12 applications", errors


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
            compile_all({"matched": list(large.matched.blocks)})
        moments = [os.times()]
        for _ in range(2):  # the second one only runs
            run(states)
            moments.append(os.times())
    own, compiler = ([m.user + m.system for m in moments], [m.children_user for m in moments])
    in_python = (own[1] - own[0]) - (own[2] - own[1])
    return in_python + compiler[1] - compiler[0], in_python

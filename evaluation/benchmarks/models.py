"""Inference and training steps of Raptors beside the reference's blocks and the teacher's layers.

Four candidates of one size, with random weights and k = 3: *reference* is the block of the research
code, written out below; *exact* is our block with its architecture; *matched* is our default, which
costs as much as a layer of the teacher; *teacher* is transformers' own layers. Speeds are multiples
of the reference's in one interleaved run, in which the reference is measured twice.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
import torch
from torch import nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from raptor_hf.configuration_raptor import RaptorConfig
from raptor_hf.distillation.compute import application_flops
from raptor_hf.modeling_raptor import RaptorModel

from .timing import Row, clock_of, interleaved, matmul_peak, speed_rows

PHASES = [7, 3, 2]
# DINOv2 ViT-B/14 at 224 px, and the teacher of the digits
SIZES = {
    "base": dict(hidden_size=768, num_attention_heads=12, image_size=224, patch_size=14),
    "digits": dict(hidden_size=64, num_attention_heads=4, image_size=16, patch_size=4),
}


class ReferenceBlock(nn.Module):
    """A block as the research code has it: attention that also returns its weights, a SwiGLU of
    hidden width 4·D, and a depth MLP that is run for every sample.
    """

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size, eps=1e-6), nn.LayerNorm(size, eps=1e-6)
        self.attention = nn.MultiheadAttention(size, heads, batch_first=True)
        self.gate_and_up, self.down = nn.Linear(size, 8 * size), nn.Linear(4 * size, size)
        self.depth = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 3 * size))
        self.layer_scale1 = nn.Parameter(torch.full((size,), 0.1))
        self.layer_scale2 = nn.Parameter(torch.full((size,), 0.1))

    def forward(self, states: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
        """Return states (B, N, D) one layer deeper; `depth` (B, 1) for every sample."""
        s1, s2, s3 = (self.depth(depth) + 1)[:, None].chunk(3, dim=-1)
        normed = self.norm1(states)
        mixed, _ = self.attention(normed, normed, normed)
        states = states + s1 * self.layer_scale1 * mixed
        gate, up = self.gate_and_up(self.norm2(states)).chunk(2, dim=-1)
        states = states + s2 * self.layer_scale2 * self.down(nn.functional.silu(gate) * up)
        return states * s3


class Candidates:
    """The four models of one size.

    Args:
        size: one of `SIZES`.

    Attributes:
        layers: the blocks or layers of each candidate.
        rollouts: functions of states (B, N, D) that return the states after every layer.
        flops: of an image.
    """

    def __init__(self, size: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32):
        torch.manual_seed(0)
        config = Dinov2WithRegistersConfig(**SIZES[size], num_register_tokens=4)
        self.num_tokens = 5 + (config.image_size // config.patch_size) ** 2
        self.width, self.device, self.dtype = config.hidden_size, device, dtype

        # the models
        options = {"teacher_config": config, "phases": PHASES, "layerscale_value": 0.1}
        wide = {"ffn": "swiglu", "intermediate_size": 4 * self.width}
        self.matched = RaptorModel(RaptorConfig(**options)).to(device, dtype).eval()
        exact = RaptorModel(RaptorConfig(**options, **wide)).to(device, dtype).eval()
        heads = config.num_attention_heads
        reference = nn.ModuleList(ReferenceBlock(self.width, heads) for _ in PHASES)
        reference = reference.to(device, dtype).eval()
        teacher = Dinov2WithRegistersModel(config).encoder.layer.to(device, dtype).eval()

        # their parts, and what they do
        self.layers = {"reference": reference, "exact": exact.blocks,
                       "matched": self.matched.blocks, "teacher": teacher}  # fmt: skip
        owners = np.repeat(np.arange(len(PHASES)), PHASES)
        steps = [partial(_reference_step, reference[b], n) for n, b in enumerate(owners, 1)]
        self.rollouts = {
            "reference": partial(_roll_out, steps),
            "exact": partial(_roll_out, raptor_steps(exact)),
            "matched": partial(_roll_out, raptor_steps(self.matched)),
            "teacher": partial(_roll_out, teacher),
        }
        wide, plain = (12 * application_flops(model.config, self.num_tokens)
                       for model in (exact, self.matched))  # fmt: skip
        self.flops = {"reference": wide, "exact": wide, "matched": plain, "teacher": plain}

    def states(self, batch: int) -> torch.Tensor:
        """Return random states (B, N, D) as after the embeddings."""
        generator = torch.Generator().manual_seed(batch)
        states = torch.randn(batch, self.num_tokens, self.width, generator=generator)
        return states.to(self.device, self.dtype)

    def compile(self, **options) -> None:
        """Compile every block and every layer by itself, for one batch size."""
        torch._dynamo.reset()  # of one function it keeps eight forms only
        for parts in self.layers.values():
            for part in parts:
                part.compile(dynamic=False, **options)


def _reference_step(block: ReferenceBlock, depth: int, states: torch.Tensor) -> torch.Tensor:
    """Apply a block of the reference, which wants its depth as a tensor of every sample."""
    return block(states, states.new_full((len(states), 1), float(depth)))


def raptor_steps(model: RaptorModel) -> list[Callable]:
    """Return the applications of a Raptor's blocks, in order."""
    return [partial(model.advance, depth=n) for n in range(1, model.config.num_hidden_layers + 1)]


def _roll_out(steps: Iterable[Callable], states: torch.Tensor) -> list[torch.Tensor]:
    """Return the states after every step."""
    trajectory = []
    for step in steps:
        states = step(states)
        trajectory.append(states)
    return trajectory


def _compare(calls: dict[str, Callable], rounds: int, device: str) -> dict[str, list[float]]:
    """Return the times of candidates in seconds; the reference is measured twice."""
    calls = calls | {"reference again": calls["reference"]}
    return interleaved(calls, rounds=rounds, clock=clock_of(device))


def _relative(values: dict[str, float], name: str) -> dict[str, float]:
    """Return values as multiples of one of them."""
    return {key: value / values[name] for key, value in values.items()}


@torch.no_grad()
def benchmark_model(size: str, batches: list[int], rounds: int, device: str) -> Iterator[Row]:
    """Yield the speed of inference: plain, compiled, and on a GPU as CUDA graphs."""
    # sizes, which need no clock
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    candidates = Candidates(size, device=device, dtype=dtype)
    yield "FLOP, times the teacher's", _relative(candidates.flops, "teacher")
    weights = {}
    for name, layers in candidates.layers.items():
        weights[name] = sum(weight.nbytes for weight in layers.parameters())
    yield "bytes of the weights, times the teacher's", _relative(weights, "teacher")
    peak = matmul_peak(device, dtype, rounds)
    yield "TFLOP/s in large products", {"measured": peak / 1e12}

    def call(rollout: Callable, states: torch.Tensor) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        rollout(states)

    # each form, at each batch
    modes = {"plain": None, "compiled": None}
    if device == "cuda":
        modes["graphs"] = "reduce-overhead"
    for form, mode in modes.items():
        for batch in batches:
            if form != "plain":
                candidates.compile(mode=mode)
            states, calls = candidates.states(batch), {}
            for name, rollout in candidates.rollouts.items():
                calls[name] = partial(call, rollout, states)
            times, title = _compare(calls, rounds, device), f"inference, batch {batch}, {form}"
            yield from speed_rows(title, times, candidates.flops, batch, peak)


def benchmark_train_step(size: str, batches: list[int], rounds: int, device: str) -> Iterator[Row]:
    """Yield the speed of a training step, and the memory that it keeps for the backward pass.

    Weights are float32; on a GPU autocast computes in bfloat16.
    """
    peak = matmul_peak(device, torch.bfloat16 if device == "cuda" else torch.float32, rounds)
    yield "TFLOP/s in large products", {"measured": peak / 1e12}
    for form in ("plain", "compiled"):
        for batch in batches:
            # the teacher is what the others learn from; one more saves memory
            candidates = Candidates(size, device=device)
            states = candidates.states(batch)
            with torch.no_grad():
                target = torch.stack(candidates.rollouts.pop("teacher")(states))
            saving = copy.deepcopy(candidates.matched)
            saving.gradient_checkpointing_enable()
            candidates.layers["matched, checkpointed"] = saving.blocks
            candidates.rollouts["matched, checkpointed"] = partial(_roll_out, raptor_steps(saving))
            if form == "compiled":
                candidates.compile()

            losses, steps = {}, {}
            for name, rollout in candidates.rollouts.items():
                blocks = candidates.layers[name].train()
                losses[name] = partial(_loss, rollout, states, target)
                fused = name != "reference"
                optimizer = torch.optim.AdamW(blocks.parameters(), lr=1e-4, fused=fused)
                steps[name] = partial(_step, losses[name], blocks, optimizer)
            if form == "plain":
                kept = {name: kept_bytes(loss) / batch for name, loss in losses.items()}
                megabytes = {"reference, MB an image": kept["reference"] / 1e6}
                title = f"kept for the backward pass, batch {batch}"
                yield title, _relative(kept, "reference") | megabytes
            flops = {name: 3 * value for name, value in candidates.flops.items()}
            times, title = _compare(steps, rounds, device), f"training step, batch {batch}, {form}"
            yield from speed_rows(title, times, flops, batch, peak)


def _loss(rollout: Callable, states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error over all layers."""
    with torch.autocast(states.device.type, torch.bfloat16, enabled=states.is_cuda):
        trajectory = torch.stack(rollout(states))
    return (trajectory - target).square().mean()


def _step(loss: Callable, blocks: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make one optimiser update."""
    loss().backward()
    nn.utils.clip_grad_norm_(blocks.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def kept_bytes(work: Callable[[], torch.Tensor]) -> int:
    """Return the bytes that autograd keeps for the backward pass, weights not counted."""
    kept: dict[tuple[int, int], int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        is_weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        if not is_weight:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr(), storage.nbytes()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    del result
    return sum(kept.values())

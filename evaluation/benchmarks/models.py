"""Inference and training steps of Raptors beside the reference's blocks and the teacher's layers.

Four candidates of one size, with random weights and k = 3: *reference* is the block of the research
code, written out below; *exact* has its architecture and weights in our block; *matched* is our
default, which costs as much as a layer of the teacher; *teacher* is transformers' own layers.
Speeds are multiples of the reference's in one interleaved run.
"""

import copy
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from raptor_hf.configuration_raptor import RaptorConfig
from raptor_hf.distillation.compute import application_flops
from raptor_hf.modeling_raptor import RaptorBlock, RaptorModel

from .timing import Row, compare, matmul_peak, speed_rows

PHASES = [7, 3, 2]
# DINOv2 ViT-B/14 and ViT-S/14 at 224 px, and the teacher of the digits
SIZES = {
    "base": dict(hidden_size=768, num_attention_heads=12, image_size=224, patch_size=14),
    "small": dict(hidden_size=384, num_attention_heads=6, image_size=224, patch_size=14),
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
        for weight in self.depth[2].parameters():
            nn.init.normal_(weight, std=1e-4)
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

    def copy_to(self, block: RaptorBlock) -> None:
        """Give a block of ours (SwiGLU, hidden 4·D) the same weights."""
        attention, depth = self.attention, block.depth_scaling
        pairs = {
            block.norm1: self.norm1, block.norm2: self.norm2, block.ffn.fc1: self.gate_and_up,
            block.ffn.fc2: self.down, block.attention.proj: attention.out_proj,
            depth.fc1: self.depth[0], depth.fc2: self.depth[2],
        }  # fmt: skip
        for ours, theirs in pairs.items():
            ours.load_state_dict(theirs.state_dict())
        with torch.no_grad():
            block.attention.qkv.weight.copy_(attention.in_proj_weight)
            block.attention.qkv.bias.copy_(attention.in_proj_bias)
            block.layer_scale1.copy_(self.layer_scale1)
            block.layer_scale2.copy_(self.layer_scale2)


class Candidates:
    """The four models of one size, and their rollouts.

    LayerScales are 0.1, as in trained models. At their initial 1e-5 blocks change nothing, and the
    errors of int8 would not show.
    """

    def __init__(self, size: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32):
        torch.manual_seed(0)
        shape = {**SIZES[size], "layerscale_value": 0.1}
        config = Dinov2WithRegistersConfig(**shape, num_register_tokens=4, num_hidden_layers=12)
        self.num_tokens = 5 + (config.image_size // config.patch_size) ** 2
        self.width, self.device, self.dtype = config.hidden_size, device, dtype

        # the models; exact has the weights of the reference
        options = {"teacher_config": config, "phases": PHASES, "layerscale_value": 0.1}
        self.matched = RaptorModel(RaptorConfig(**options))
        options |= {"ffn": "swiglu", "intermediate_size": 4 * self.width}
        self.exact = RaptorModel(RaptorConfig(**options))
        sizes = (self.width, config.num_attention_heads)
        reference = nn.ModuleList(ReferenceBlock(*sizes) for _ in PHASES)
        for ours, theirs in zip(self.exact.blocks, reference, strict=True):
            theirs.copy_to(ours)
        self.layers = {
            "reference": reference, "exact": self.exact.blocks, "matched": self.matched.blocks,
            "teacher": Dinov2WithRegistersModel(config).encoder.layer,
        }  # fmt: skip
        for module in (self.exact, self.matched, *self.layers.values()):
            module.to(device, dtype).eval()

        # a function of each: states (B, N, D) to a list of the states after every layer
        self.rollouts = {
            "reference": partial(_apply_reference, reference),
            "exact": partial(_apply_raptor, self.exact),
            "matched": partial(_apply_raptor, self.matched),
            "teacher": partial(_apply_layers, self.layers["teacher"]),
        }
        # FLOP of an image
        exact, matched = (
            12 * application_flops(model.config, self.num_tokens)
            for model in (self.exact, self.matched)
        )
        self.flops = {"reference": exact, "exact": exact, "matched": matched, "teacher": matched}

    def states(self, batch: int) -> torch.Tensor:
        """Return random states (B, N, D) as after the embeddings."""
        generator = torch.Generator().manual_seed(batch)
        states = torch.randn(batch, self.num_tokens, self.width, generator=generator)
        return states.to(self.device, self.dtype)


def _apply_reference(blocks: nn.ModuleList, states: torch.Tensor) -> list[torch.Tensor]:
    """Apply each block as often as its phase is long."""
    trajectory, depth = [], 0
    for block, length in zip(blocks, PHASES, strict=True):
        for _ in range(length):
            depth += 1
            states = block(states, states.new_full((len(states), 1), float(depth)))
            trajectory.append(states)
    return trajectory


def _apply_raptor(model: RaptorModel, states: torch.Tensor) -> list[torch.Tensor]:
    """Apply the blocks of a Raptor."""
    trajectory = []
    for depth in range(1, model.config.num_hidden_layers + 1):
        states = model.advance(states, depth)
        trajectory.append(states)
    return trajectory


def _apply_layers(layers: nn.ModuleList, states: torch.Tensor) -> list[torch.Tensor]:
    """Apply the layers of the teacher."""
    trajectory = []
    for layer in layers:
        states = layer(states)
        trajectory.append(states)
    return trajectory


def _compile(layers: dict[str, nn.ModuleList], **options) -> None:
    """Compile every block and every layer by itself, for one batch size."""
    torch._dynamo.reset()  # of one function it keeps eight forms only
    for parts in layers.values():
        for part in parts:
            part.compile(dynamic=False, **options)


def _relative(values: dict[str, float], name: str) -> dict[str, float]:
    """Return values as multiples of one of them."""
    return {key: value / values[name] for key, value in values.items()}


@torch.no_grad()
def benchmark_model(size: str, batches: list[int], rounds: int, device: str) -> Iterator[Row]:
    """Yield the speed of inference: plain, compiled, and as CUDA graphs or in int8."""
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
        if device == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        rollout(states)

    for form in ("plain", "compiled", *(["graphs"] if device == "cuda" else [])):
        for batch in batches:
            if form != "plain":
                mode = "reduce-overhead" if form == "graphs" else None
                _compile(candidates.layers, mode=mode)
            states, calls = candidates.states(batch), {}
            for name, rollout in candidates.rollouts.items():
                calls[name] = partial(call, rollout, states)
            times, title = compare(calls, rounds, device), f"inference, batch {batch}, {form}"
            yield from speed_rows(title, times, candidates.flops, batch, peak)
    if device == "cpu" and importlib.util.find_spec("torchao"):
        yield from _benchmark_int8(size, batches, rounds)


def _benchmark_int8(size: str, batches: list[int], rounds: int) -> Iterator[Row]:
    """Yield the speed of int8 beside the reference in float32, and its error as 1 − R²."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    candidates = Candidates(size)
    rollouts, states = candidates.rollouts, candidates.states(1)
    quantised = {name: parts for name, parts in candidates.layers.items() if name != "reference"}
    expected = {name: rollouts[name](states)[-1] for name in quantised}
    for parts in quantised.values():
        quantize_(parts, Int8DynamicActivationInt8WeightConfig())
    for batch in batches:
        _compile(quantised)
        given = candidates.states(batch)
        calls = {name: partial(rollout, given) for name, rollout in rollouts.items()}
        times = compare(calls, rounds, "cpu")
        title = f"inference, batch {batch}, in int8 beside the reference"
        yield next(speed_rows(title, times, candidates.flops, batch, peak=1.0))
    errors = {}
    for name, exact in expected.items():
        spread = (exact - exact.mean(dim=(0, 1))).square().sum()
        errors[name] = ((rollouts[name](states)[-1] - exact).square().sum() / spread).item()
    yield "1 − R² of int8 after 12 applications", errors


def benchmark_train_step(size: str, batches: list[int], rounds: int, device: str) -> Iterator[Row]:
    """Yield the speed of a training step, and the memory that it keeps for the backward pass.

    Weights are float32; on a GPU autocast computes in bfloat16.
    """
    peak = matmul_peak(device, torch.bfloat16 if device == "cuda" else torch.float32, rounds)
    yield "TFLOP/s in large products", {"measured": peak / 1e12}
    for batch in batches:
        for form in ("plain", "compiled"):
            # the teacher is what the others learn from
            candidates = Candidates(size, device=device)
            states = candidates.states(batch)
            with torch.no_grad():
                target = torch.stack(candidates.rollouts.pop("teacher")(states))
            layers, rollouts = candidates.layers, candidates.rollouts
            saving = copy.deepcopy(candidates.matched)
            saving.gradient_checkpointing_enable()
            layers["matched, checkpointed"] = saving.blocks
            rollouts["matched, checkpointed"] = partial(_apply_raptor, saving)
            if form == "compiled":
                _compile(layers)

            losses, steps = {}, {}
            for name, rollout in rollouts.items():
                blocks = layers[name].train()
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
            times, title = compare(steps, rounds, device), f"training step, batch {batch}, {form}"
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

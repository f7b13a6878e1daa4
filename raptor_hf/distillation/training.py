"""Train chains of blocks: the plan of a training, and the training itself."""

import torch
from accelerate.utils import reduce
from transformers import PreTrainedModel

from ..activations.online import Activations
from ..data import batches
from ..loop import Validation, check_training, fit
from ..loop.arguments import LoopArguments
from ..modeling_raptor import rotary_angles
from ..runs.files import free_bytes, size
from ..runs.processes import process_state
from .arguments import ObjectiveArguments
from .blocks import Chain
from .compute import application_flops, optimizer_flops, rollouts_per_step
from .matching import TrajectoryMatching, matching_loss
from .objective import choose_rows, state_variances, token_loss
from .rollout import rollout
from .rounding import gptq, keep_rounded, product_layers, record_inputs, round_weight


def print_plan(
    chains: list[Chain],
    teacher: PreTrainedModel,
    activations: Activations,
    objective: ObjectiveArguments,
    loop: LoopArguments,
) -> None:
    """Check that a training can run, and print what it reads, computes and writes.

    FLOP are counted (2 a multiply-add, matrix products only); nothing is measured.

    Raises:
        ImportError, ValueError: as `check_training`.
    """
    # the sizes: of a block, of an image's states, of the run
    check_training(loop, len(activations))
    spans = [span for chain in chains for span in chain.spans]
    if objective.quantize:
        for layer in product_layers(spans[0].block):  # refuses other than whole groups
            round_weight(layer.weight, objective.quantize)
    block = spans[0].block.attention.config
    states = activations.states(activations.__getitems__([0]))
    for chain in chains:  # refuses weights of tokens that the teacher does not have
        token_loss(states, states, groups=activations.layout.groups(), weights=chain.weights)
    num_tokens, images = states.shape[2], loop.steps * loop.batch_size
    online = "images" in vars(activations)
    if online and activations.also:  # half of the batches have a second size
        other = activations.states(activations.also.__getitems__([0]))
        num_tokens = (num_tokens + other.shape[2]) // 2

    # forward and backward of all applications, the optimiser, and the teacher if it runs, too
    applications = sum(span.stop - span.start for span in spans)
    passes = rollouts_per_step(objective, loop.steps)
    flop = 3 * passes * images * applications * application_flops(block, num_tokens)
    flop += loop.steps * optimizer_flops(loop.optimizer, block, len(spans))
    parameters = 0
    for span in spans:
        parameters += sum(map(torch.numel, span.block.parameters()))
    moments = 1 if loop.optimizer == "muon" else 2
    reads = size(images * states[0].numel() * states.element_size())
    if online:
        share = activations.layers[-1] / activations.depth
        teacher_flop = 2 * images * num_tokens * teacher.num_parameters() * share
        reads = f"about {teacher_flop:.3g} FLOP of the teacher"

    process_state().print(
        f"teacher   {teacher.config.model_type}, {activations.depth} layers, {num_tokens} tokens\n"
        f"images    {len(activations):,}, {'online' if online else 'stored'}; {images:,} in "
        f"{loop.steps:,} steps of {loop.batch_size}: {images / len(activations):.3g} epochs, "
        f"{images * num_tokens:.3g} tokens\n"
        f"reads     {reads}\n"
        f"trains    {len(spans)} blocks of {parameters / len(spans) / 1e6:.3g} M parameters: "
        f"layers {', '.join(span.name for span in spans)}\n"
        f"computes  {flop:.3g} FLOP\n"
        f"writes    {loop.output_dir}: {size(4 * parameters)}, and checkpoints of "
        f"{size(4 * (1 + moments) * parameters)}; {size(free_bytes(loop.output_dir))} free",
        flush=True,
    )


@torch.no_grad()
def round_chains(
    chains: list[Chain],
    activations: Activations,
    bits: int,
    *,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Round the matrices of the blocks of chains in place, so that rollouts change little (`gptq`).

    The processes share the rows that the blocks roll out on, 256 at most.

    Args:
        activations: a source of the states of all layers that the chains cover; of two sizes of
            images the first is taken.
        angles: rotary angles of families that have them.

    Raises:
        ValueError: rollouts that are not finite, or inputs of a matrix in no whole groups of 32.
    """
    # what the matrices get in all applications
    device, first = process_state().device, activations.layers[0]
    blocks = [span.block.to(device) for chain in chains for span in chain.spans]
    layers = [layer for block in blocks for layer in product_layers(block)]
    rows = choose_rows(activations, 256)
    with record_inputs(layers) as squares:
        for batch in batches(activations, 32, "inputs of the blocks", rows=rows):
            states = activations.states(batch).to(device).float()
            for chain in chains:
                part = states[:, chain.layers[0] - first : chain.layers[-1] - first + 1]
                rollout(chain.spans, part, resets={chain.layers[0]}, angles=angles)

    # the means over all processes: only ratios matter
    for layer in layers:
        inputs = reduce(squares[layer])
        if not inputs.isfinite().all():
            raise ValueError("Rollouts of these blocks are not finite: nothing can be rounded.")
        layer.weight.copy_(gptq(layer.weight, inputs, bits))


def train_chains(
    chains: list[Chain],
    teacher: PreTrainedModel,
    activations: Activations,
    objective: ObjectiveArguments,
    loop: LoopArguments,
    *,
    validation: Validation | None = None,
    groups: list[dict] | None = None,
    new_views: bool = False,
    last_only: bool = False,
) -> None:
    """Train the blocks of chains in place, so that they follow the teacher's states.

    With `quantize` they are rounded first (`round_chains`), learn on with rounded matrices, and
    their configuration says the bits.

    Args:
        activations: a source of the states of all layers that the chains cover.
        validation, groups, new_views: as for `fit`, whose errors are raised.
        last_only: the state of each chain's last layer alone counts.
    """
    # what the loss is computed with
    variances = None if objective.normalize == "none" else state_variances(activations)
    angles = rotary_angles(teacher, tuple(activations.resolution))
    token_groups = activations.layout.groups()
    if objective.quantize:
        round_chains(chains, activations, objective.quantize, angles=angles)
    # train the blocks of all chains at once
    module = TrajectoryMatching(
        chains, objective, token_groups, variances, angles, last_only=last_only
    )
    fit(
        module, activations, matching_loss(activations), loop, groups=groups, kind=module.kind,
        new_views=new_views, validation=validation,
    )  # fmt: skip
    # the weights that were learned with are those that are saved
    if objective.quantize:
        keep_rounded(module.blocks)
        for block in module.blocks.values():
            block.attention.config.weight_bits = objective.quantize

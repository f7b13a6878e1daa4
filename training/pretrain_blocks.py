"""Stage 1: train blocks, each on its own span of layers, all in one run from one read of the data.

    accelerate launch training/pretrain_blocks.py training/recipes/digits_reference_blocks.yaml \
        --teacher outputs/digits/teacher --activations outputs/digits/activations \
        --spans 0-7 7-10 10-12 --output_dir outputs/digits/blocks

`--phases_file outputs/digits/phases/phases.json --k 2 3 4` takes the spans of partitions instead.
"""

from dataclasses import dataclass, field

from transformers import set_seed

from raptor_hf.activations.arguments import ActivationArguments
from raptor_hf.configuration_raptor import phase_spans, token_layout
from raptor_hf.distillation.blocks import BlockArguments, Chain, make_span, parse_span, save_blocks
from raptor_hf.distillation.fidelity import ValidationArguments, make_validation
from raptor_hf.distillation.matching import TrajectoryMatching, matching_explanation, matching_loss
from raptor_hf.distillation.objective import ObjectiveArguments, parse_token_weights
from raptor_hf.distillation.refit import RefitArguments
from raptor_hf.dry_runs.plans import print_training_plan
from raptor_hf.loop.arguments import ComputeArguments, LoopArguments
from raptor_hf.loop.checkpoints import remove_checkpoints
from raptor_hf.loop.fit import fit
from raptor_hf.runs.arguments import parse_arguments
from raptor_hf.runs.files import read_json
from raptor_hf.runs.folder import finish_run, start_run
from raptor_hf.runs.processes import process_state, run_program
from raptor_hf.teachers import load_backbone


@dataclass
class Arguments(
    ActivationArguments,
    ValidationArguments,
    BlockArguments,
    ComputeArguments,
    RefitArguments,
    ObjectiveArguments,
    LoopArguments,
):
    """Which spans to train from which activations; blocks, objective, loop and validation."""

    spans: list[str] = field(
        default_factory=list, metadata={"help": "spans of layers, like 0-7 7-10"}
    )
    phases_file: str | None = field(
        default=None, metadata={"help": "phases.json of find_phases.py"}
    )
    k: list[int] = field(
        default_factory=list, metadata={"help": "partitions of phases_file to cover"}
    )
    last_block_weights: str = field(
        default="0.34,0.33,0.33", metadata={"help": "token_weights of spans that end at layer L"}
    )


def main() -> None:
    """Build one block per span, train them together, save them in one file."""
    arguments = parse_arguments(Arguments)
    weights = parse_token_weights(arguments.token_weights)
    last = parse_token_weights(arguments.last_block_weights)
    if arguments.phase_fraction:
        raise ValueError("--phase_fraction is for whole Raptors: here blocks have one phase each.")
    if bool(arguments.phases_file) != bool(arguments.k):
        raise ValueError("--phases_file FILE and --k 2 3 4 need each other.")
    spans = {parse_span(text) for text in arguments.spans}
    for k in arguments.k:
        spans |= set(phase_spans(read_json(arguments.phases_file)["phases"][str(k)]))
    if not spans:
        raise ValueError("Which layers? Give --spans 0-7 7-10 …, or --phases_file FILE --k 3.")
    if arguments.dry_run:
        return print_training_plan(arguments, [[span] for span in sorted(spans)])
    teacher = load_backbone(arguments.teacher, arguments.revision)
    set_seed(arguments.seed)
    options = arguments.block_options()
    blocks = [make_span(teacher, *span, compute=arguments, **options) for span in sorted(spans)]
    num_layers = teacher.config.num_hidden_layers
    chains = [Chain([span], last if span.stop == num_layers else weights) for span in blocks]
    module = TrajectoryMatching(chains, arguments, token_layout(teacher.config).groups())
    activations = arguments.open(teacher, module.layers)
    if start_run(arguments, inputs={"activations": activations.identity()}):
        return
    arguments.refit_blocks(blocks, activations, init=arguments.init)
    fit(
        module, activations, matching_loss(activations), arguments,
        clip_apart=list(module.blocks.values()), new_views=arguments.new_views,
        validate=make_validation(arguments, teacher, chains),
        validate_every=arguments.validate_every, explain=matching_explanation(activations),
        description="blocks",
    )  # fmt: skip
    if process_state().is_main_process:
        save_blocks(blocks, arguments.output_dir)
        finish_run(arguments.output_dir)
        remove_checkpoints(arguments.output_dir)


if __name__ == "__main__":
    run_program(main)

"""Stage 1: train blocks, each on its own span of layers, all in one run from one read of the data.

    accelerate launch training/pretrain_blocks.py training/recipes/digits_reference_blocks.yaml \
        --teacher outputs/digits/teacher --activations outputs/digits/activations \
        --spans 0-7 7-10 10-12 --output_dir outputs/digits/blocks

`--phases_file outputs/digits/phases/phases.json --k 2 3 4` takes the spans of partitions instead.
"""

from dataclasses import asdict, dataclass, field

import transformers

from raptor_hf import activations, distillation, loop
from raptor_hf.activations.arguments import ActivationArguments, ImageArguments
from raptor_hf.configuration_raptor import phase_spans
from raptor_hf.data.arguments import CropArguments, ReadingArguments
from raptor_hf.distillation.arguments import (
    BlockArguments,
    ObjectiveArguments,
    ValidationArguments,
    parse_token_weights,
    read_phases,
)
from raptor_hf.loop.arguments import ComputeArguments, LoopArguments
from raptor_hf.runs.arguments import parse_arguments
from raptor_hf.runs.folder import finish_run, start_run
from raptor_hf.runs.processes import process_state, run_program
from raptor_hf.teachers import load_backbone


@dataclass(kw_only=True)
class Arguments:
    """Which spans of layers get a block."""

    _argument_group_name = "spans"

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


PARTS = (
    Arguments, ActivationArguments, ImageArguments, BlockArguments, CropArguments,
    ReadingArguments, ObjectiveArguments, ComputeArguments, ValidationArguments, LoopArguments,
)  # fmt: skip


def read_spans(own: Arguments) -> list[tuple[int, int]]:
    """Return the spans that are given, and those of the partitions of a file, in order."""
    if bool(own.phases_file) != bool(own.k):
        raise ValueError("--phases_file FILE and --k 2 3 4 need each other.")
    spans = set()
    for text in own.spans:
        start, dash, stop = text.partition("-")
        if not (dash and start.isdigit() and stop.isdigit()):
            raise ValueError(f"A span is written start-stop, like 0-7; got {text!r}.")
        spans.add((int(start), int(stop)))
    for k in own.k:
        spans |= set(phase_spans(read_phases(own.phases_file, k)))
    if not spans:
        raise ValueError("Which layers? Give --spans 0-7 7-10 …, or --phases_file FILE --k 3.")
    return sorted(spans)


def main(argv: list[str] | None = None) -> None:
    """Make one block per span, train them together, save them in one file."""
    parts = parse_arguments(*PARTS, argv=argv)
    own, source, images, blocks, crops, reading, objective, compute, validation, training = parts
    if objective.phase_fraction or objective.quantize:
        raise ValueError(
            "--phase_fraction and --quantize are for whole Raptors, not for single blocks."
        )

    # a) New blocks, each a chain of its own
    teacher = load_backbone(source.teacher)
    transformers.set_seed(training.seed)
    chains = []
    for start, stop in read_spans(own):
        span = distillation.make_span(teacher, start, stop, compute=compute, **asdict(blocks))
        is_last = stop == teacher.config.num_hidden_layers
        weights = own.last_block_weights if is_last else objective.token_weights
        chains.append(distillation.Chain([span], parse_token_weights(weights)))
    spans = [chain.spans[0] for chain in chains]

    # b) The states that they learn from, and the validation
    layers = distillation.covered_layers(chains)
    states = activations.open_source(source, images, crops, reading, teacher, layers)
    validate = distillation.open_validation(
        validation, teacher, chains, processor=states.processor, reading=reading,
        num_workers=training.num_workers,
    )  # fmt: skip

    # c) The plan
    distillation.print_plan(chains, teacher, states, objective, training)
    inputs = distillation.source_inputs(teacher, states)
    if start_run(*parts, inputs=inputs, images=states.files(images.dataset)):
        return

    # d) Train and save
    distillation.train_chains(
        chains, teacher, states, objective, training, validation=validate,
        groups=[{"params": list(span.block.parameters())} for span in spans],
        new_views=source.online and images.views == 0,
    )  # fmt: skip
    if process_state().is_main_process:
        distillation.save_blocks(spans, training.output_dir)
        dataset = images.dataset or states.manifest["dataset"]
        distillation.write_training(teacher, training, objective, blocks, own, dataset=dataset)
        finish_run(training.output_dir)
        loop.remove_checkpoints(training.output_dir)


if __name__ == "__main__":
    run_program(main)

"""Train a Raptor end to end, from its teacher's layers or from the blocks of stage 1.

    accelerate launch training/distill_raptor.py training/recipes/digits_raptor.yaml \
        --teacher outputs/digits/teacher --activations outputs/digits/activations \
        --phases 7 3 2 --output_dir outputs/digits/seed_0/raptor_k3

`--phases_file outputs/digits/phases/phases.json --k 3` takes the phases from there instead. With
`--phase_fraction 0.5` the blocks spend half of the steps each in its own phase; the published
recipe does that in a run of its own, `pretrain_blocks.py`, whose result `--blocks` takes. It takes
a Raptor, too, which learns on: at another resolution, or with `--quantize 4`.
"""

from dataclasses import asdict, dataclass, field

import transformers

import raptor_hf
from raptor_hf import activations, distillation, loop
from raptor_hf.activations.arguments import ActivationArguments, ImageArguments
from raptor_hf.data.arguments import CropArguments, ReadingArguments
from raptor_hf.distillation.arguments import (
    BlockArguments,
    ObjectiveArguments,
    ValidationArguments,
    parse_token_weights,
    read_phases,
)
from raptor_hf.loop.arguments import ComputeArguments, LoopArguments
from raptor_hf.runs.arguments import check_positive, parse_arguments
from raptor_hf.runs.files import folder_digest
from raptor_hf.runs.folder import finish_run, start_run
from raptor_hf.runs.processes import process_state, run_program
from raptor_hf.teachers import load_backbone


@dataclass(kw_only=True)
class Arguments:
    """Which layers each block makes, and which blocks to start from."""

    _argument_group_name = "phases"

    blocks: str | None = field(
        default=None,
        metadata={"help": "folder of pretrain_blocks.py or of a Raptor; default: new blocks"},
    )
    phases: list[int] = field(default_factory=list, metadata={"help": "layers of each phase"})
    phases_file: str | None = field(
        default=None, metadata={"help": "phases.json of find_phases.py"}
    )
    k: int | None = field(default=None, metadata={"help": "which partition of phases_file"})

    def __post_init__(self):
        check_positive(self, "phases", "k")


PARTS = (
    Arguments, ActivationArguments, ImageArguments, BlockArguments, CropArguments,
    ReadingArguments, ObjectiveArguments, ComputeArguments, ValidationArguments, LoopArguments,
)  # fmt: skip
# what was best for a real DINOv2: docs/recipes.md
DEFAULTS = {
    "objective": "autoregressive", "normalize": "group", "token_weights": "0.05,0.05,0.90",
    "phase_fraction": 0.5, "optimizer": "muon", "learning_rate": 3e-3,
}  # fmt: skip


def find_lengths(own: Arguments) -> list[int]:
    """Return the phases, as they are given or from a file."""
    if bool(own.phases) == bool(own.phases_file) or bool(own.k) != bool(own.phases_file):
        raise ValueError("Which layers? Give either --phases 7 3 2, or --phases_file FILE --k 3.")
    return own.phases or read_phases(own.phases_file, own.k)


def main(argv: list[str] | None = None) -> None:
    """Chain the blocks, train them, save the model with the teacher's image processor."""
    parts = parse_arguments(*PARTS, argv=argv, defaults=DEFAULTS)
    own, source, images, blocks, crops, reading, objective, compute, validation, training = parts
    lengths = find_lengths(own)
    if own.blocks and blocks != BlockArguments():
        raise ValueError(
            f"--blocks {own.blocks} are finished blocks: init, ffn and the other options of "
            "new blocks contradict it. Leave them out, or leave out --blocks."
        )

    # a) The Raptor: its blocks are new, or those of stage 1
    teacher = load_backbone(source.teacher)
    transformers.set_seed(training.seed)
    if own.blocks:
        model = distillation.raptor_from_blocks(teacher, lengths, own.blocks)
    else:
        model = raptor_hf.make_raptor(teacher, lengths, **asdict(blocks))
    loop.configure_compute(model, compute)
    chains = [distillation.chain_of(model, parse_token_weights(objective.token_weights))]

    # b) The states that it learns from, and the validation
    layers = distillation.covered_layers(chains)
    states = activations.open_source(source, images, crops, reading, teacher, layers)
    validate = distillation.open_validation(
        validation, teacher, chains, processor=states.processor, reading=reading,
        num_workers=training.num_workers,
    )  # fmt: skip

    # c) The plan
    distillation.print_plan(chains, teacher, states, objective, training)
    inputs = distillation.source_inputs(teacher, states) | {"phases": lengths}
    if own.blocks:
        inputs["blocks"] = folder_digest(own.blocks)
    if start_run(*parts, inputs=inputs, images=states.files(images.dataset)):
        return

    # d) Train and save
    distillation.train_chains(
        chains, teacher, states, objective, training, validation=validate,
        new_views=source.online and images.views == 0,
    )  # fmt: skip
    if process_state().is_main_process:
        model.cpu().save_pretrained(training.output_dir)
        states.processor.save_pretrained(training.output_dir)
        recipe = [objective] if own.blocks else [objective, blocks]
        dataset = images.dataset or states.manifest["dataset"]
        distillation.write_training(
            teacher, training, *recipe, dataset=dataset,
            blocks=own.blocks,
        )  # fmt: skip
        finish_run(training.output_dir)
        loop.remove_checkpoints(training.output_dir)


if __name__ == "__main__":
    run_program(main)

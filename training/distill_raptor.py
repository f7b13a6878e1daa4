"""Train a Raptor end to end, from its teacher's layers or from the blocks of stage 1.

    accelerate launch training/distill_raptor.py training/recipes/digits_raptor.yaml \
        --teacher outputs/digits/teacher --activations outputs/digits/activations \
        --phases 7 3 2 --output_dir outputs/digits/seed_0/raptor_k3

`--phases_file outputs/digits/phases/phases.json --k 3` takes the phases from there instead. With
`--phase_fraction 0.5` the blocks spend half of the steps each in its own phase; the published
recipe does that in a run of its own, `pretrain_blocks.py`, whose result `--blocks` takes.
"""

from dataclasses import dataclass, field
from typing import Literal

from transformers import set_seed

from raptor_hf.activations.arguments import ActivationArguments
from raptor_hf.configuration_raptor import phase_spans, token_layout
from raptor_hf.distillation.blocks import BlockArguments, Chain, Span, raptor_from_blocks
from raptor_hf.distillation.fidelity import ValidationArguments, make_validation
from raptor_hf.distillation.matching import TrajectoryMatching, matching_explanation, matching_loss
from raptor_hf.distillation.objective import ObjectiveArguments, parse_token_weights
from raptor_hf.distillation.refit import RefitArguments
from raptor_hf.dry_runs.plans import print_training_plan
from raptor_hf.loop.arguments import ComputeArguments, LoopArguments
from raptor_hf.loop.checkpoints import remove_checkpoints
from raptor_hf.loop.fit import fit
from raptor_hf.modeling_raptor import RaptorModel
from raptor_hf.runs.arguments import parse_arguments
from raptor_hf.runs.files import folder_digest, read_json
from raptor_hf.runs.folder import finish_run, start_run
from raptor_hf.runs.processes import process_state, run_program
from raptor_hf.teachers import load_backbone, load_processor


@dataclass(kw_only=True)
class Arguments(
    ActivationArguments,
    ValidationArguments,
    BlockArguments,
    ComputeArguments,
    RefitArguments,
    ObjectiveArguments,
    LoopArguments,
):
    """Which blocks to chain in which phases; objective, loop and validation."""

    objective: Literal["annealed", "autoregressive", "teacher_forcing"] = "autoregressive"
    token_weights: str = field(
        default="0.45,0.10,0.45", metadata={"help": "of cls,registers,patches, or none: plain mean"}
    )
    blocks: str | None = field(
        default=None,
        metadata={"help": "folder of pretrain_blocks.py; without it blocks are new (init, ffn, …)"},
    )
    phases: list[int] = field(default_factory=list, metadata={"help": "layers of each phase"})
    phases_file: str | None = field(
        default=None, metadata={"help": "phases.json of find_phases.py"}
    )
    k: int | None = field(default=None, metadata={"help": "which partition of phases_file"})


def main() -> None:
    """Chain, train, save the model with the teacher's image processor."""
    arguments = parse_arguments(Arguments)
    phases = arguments.phases
    if arguments.blocks and arguments.block_options() != BlockArguments().block_options():
        raise ValueError(
            f"--blocks {arguments.blocks} are finished blocks: init, ffn and the other options of "
            "new blocks contradict it. Leave them out, or leave out --blocks."
        )
    from_file = arguments.phases_file is not None
    if bool(phases) == from_file or (arguments.k is not None) != from_file:
        raise ValueError("Which layers? Give either --phases 7 3 2, or --phases_file FILE --k 3.")
    if from_file:
        phases = read_json(arguments.phases_file)["phases"][str(arguments.k)]
    if arguments.dry_run:
        return print_training_plan(arguments, [phase_spans(phases)])
    teacher = load_backbone(arguments.teacher, arguments.revision)
    set_seed(arguments.seed)
    if arguments.blocks:
        model = raptor_from_blocks(teacher, phases, arguments.blocks)
    else:
        model = RaptorModel.from_teacher(teacher, phases, **arguments.block_options())
    arguments.set_up(model)
    spans = [Span(b, *span) for b, span in zip(model.blocks, model.config.spans(), strict=True)]
    chains = [Chain(spans, parse_token_weights(arguments.token_weights))]
    module = TrajectoryMatching(chains, arguments, token_layout(model.config).groups())
    activations = arguments.open(teacher, module.layers)
    inputs = {"activations": activations.identity(), "phases": phases}
    if arguments.blocks:
        inputs["blocks"] = folder_digest(arguments.blocks)
    if start_run(arguments, inputs=inputs):
        return
    arguments.refit_blocks(spans, activations, init="" if arguments.blocks else arguments.init)
    fit(
        module, activations, matching_loss(activations), arguments,
        new_views=arguments.new_views, description=f"raptor {'-'.join(map(str, phases))}",
        validate=make_validation(arguments, teacher, chains),
        validate_every=arguments.validate_every, explain=matching_explanation(activations),
    )  # fmt: skip
    if process_state().is_main_process:
        model.cpu().save_pretrained(arguments.output_dir)
        load_processor(arguments.teacher, arguments.revision).save_pretrained(arguments.output_dir)
        finish_run(arguments.output_dir)
        remove_checkpoints(arguments.output_dir)


if __name__ == "__main__":
    run_program(main)

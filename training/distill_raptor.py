"""Stage 2: chain the blocks of stage 1 and train them end to end.

    accelerate launch training/distill_raptor.py training/recipes/digits_raptor.yaml \
        --teacher outputs/digits/teacher --activations outputs/digits/activations \
        --blocks outputs/digits/seed_0/blocks --phases 7 3 2 \
        --output_dir outputs/digits/seed_0/raptor_k3

`--phases_file outputs/digits/phases/phases.json --k 3` takes the phases from there instead.
"""

from dataclasses import dataclass, field

from accelerate import PartialState
from transformers import set_seed

from raptor_hf.activations import load_activations
from raptor_hf.configuration_raptor import token_layout
from raptor_hf.loop import LoopArguments, fit, remove_checkpoints
from raptor_hf.losses import Distillation, raptor_from_blocks
from raptor_hf.modeling_raptor import RaptorModel
from raptor_hf.runs import finish_run, folder_digest, parse_arguments, read_json, start_run
from raptor_hf.teachers import load_backbone, load_processor


@dataclass
class Arguments(LoopArguments):
    """Which blocks to chain in which phases, and the loop's arguments."""

    teacher: str = field(metadata={"help": "folder or Hub id of the teacher"})
    activations: str = field(metadata={"help": "its activation dataset"})
    blocks: str | None = field(default=None, metadata={"help": "folder of pretrain_blocks.py"})
    init: str = field(default="teacher", metadata={"help": "without --blocks: teacher or random"})
    phases: list[int] = field(default_factory=list, metadata={"help": "layers of each phase"})
    phases_file: str | None = field(
        default=None, metadata={"help": "phases.json of find_phases.py"}
    )
    k: int = field(default=3, metadata={"help": "which partition of phases_file"})
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa or eager"})


def main() -> None:
    """Chain, train, save the model with the teacher's image processor."""
    arguments = parse_arguments(Arguments)
    teacher = load_backbone(arguments.teacher)
    activations = load_activations(arguments.activations, teacher=teacher)
    phases = arguments.phases
    if arguments.phases_file:
        phases = read_json(arguments.phases_file)["phases"][str(arguments.k)]
    set_seed(arguments.seed)
    if arguments.blocks:
        model = raptor_from_blocks(teacher, phases, arguments.blocks)
    else:
        model = RaptorModel.from_teacher(teacher, phases, init=arguments.init)
    model.set_attn_implementation(arguments.attn_implementation)
    inputs = {"activations": folder_digest(arguments.activations), "phases": phases}
    if arguments.blocks:
        inputs["blocks"] = folder_digest(arguments.blocks)
    if start_run(arguments, inputs=inputs):
        return
    groups = token_layout(model.config).groups()
    module = Distillation(model.blocks, model.config.spans(), groups)

    def compute_loss(module, batch, progress):
        return module(batch["states"].float()), {}

    description = f"raptor {'-'.join(map(str, phases))}"
    fit(module, activations, compute_loss, arguments, description=description)
    if PartialState().is_main_process:
        model.cpu().save_pretrained(arguments.output_dir)
        load_processor(arguments.teacher).save_pretrained(arguments.output_dir)
        finish_run(arguments.output_dir)
        remove_checkpoints(arguments.output_dir)


if __name__ == "__main__":
    main()

"""Stage 1: train blocks, each on its own span of layers, all in one run from one read of the data.

    accelerate launch training/pretrain_blocks.py training/recipes/digits_blocks.yaml \
        --teacher outputs/digits/teacher --activations outputs/digits/activations \
        --spans 0-7 7-10 10-12 --output_dir outputs/digits/seed_0/blocks

`--phases_file outputs/digits/phases/phases.json --k 2 3 4` takes the spans of partitions instead.
"""

from dataclasses import dataclass, field

from accelerate import PartialState
from safetensors.torch import save_file
from transformers import set_seed

from raptor_hf.activations import load_activations
from raptor_hf.configuration_raptor import phase_spans, token_layout
from raptor_hf.loop import LoopArguments, fit, remove_checkpoints
from raptor_hf.losses import BlockPretraining, make_span, teacher_forcing_weight
from raptor_hf.runs import finish_run, folder_digest, parse_arguments, read_json, start_run
from raptor_hf.teachers import load_backbone


@dataclass
class Arguments(LoopArguments):
    """Which spans to train from which activations, and the loop's arguments."""

    teacher: str = field(metadata={"help": "folder or Hub id of the teacher"})
    activations: str = field(metadata={"help": "its activation dataset"})
    spans: list[str] = field(
        default_factory=list, metadata={"help": "spans of layers, like 0-7 7-10"}
    )
    phases_file: str | None = field(
        default=None, metadata={"help": "phases.json of find_phases.py"}
    )
    k: list[int] = field(
        default_factory=list, metadata={"help": "partitions of phases_file to cover"}
    )
    init: str = field(default="teacher", metadata={"help": "blocks start from: teacher or random"})
    ffn: str = field(default="gelu", metadata={"help": "gelu or swiglu"})
    intermediate_size: int | None = field(
        default=None, metadata={"help": "hidden width of the FFN"}
    )
    depth_scaling: bool = field(default=True, metadata={"help": "scale by the layer index"})
    layerscale_value: float = field(
        default=1e-5, metadata={"help": "initial LayerScale, init=random"}
    )
    teacher_forcing: float = field(
        default=0.25, metadata={"help": "share of the steps it fades over"}
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa or eager"})


def parse_span(text: str) -> tuple[int, int]:
    """`"0-7"` as (0, 7); a ValueError says what was given."""
    start, dash, stop = text.partition("-")
    if not (dash and start.isdigit() and stop.isdigit()):
        raise ValueError(f"A span is written start-stop, like 0-7; got {text!r}.")
    return int(start), int(stop)


def main() -> None:
    """Build one block per span, train them together, save them in one file."""
    arguments = parse_arguments(Arguments)
    teacher = load_backbone(arguments.teacher)
    activations = load_activations(arguments.activations, teacher=teacher)
    spans = {parse_span(text) for text in arguments.spans}
    for k in arguments.k:
        spans |= set(phase_spans(read_json(arguments.phases_file)["phases"][str(k)]))
    set_seed(arguments.seed)
    options = {
        "init": arguments.init,
        "ffn": arguments.ffn,
        "intermediate_size": arguments.intermediate_size,
        "depth_scaling": arguments.depth_scaling,
        "layerscale_value": arguments.layerscale_value,
        "attn_implementation": arguments.attn_implementation,
    }
    blocks = [make_span(teacher, start, stop, **options) for start, stop in sorted(spans)]
    if start_run(arguments, inputs={"activations": folder_digest(arguments.activations)}):
        return
    num_layers = teacher.config.num_hidden_layers
    module = BlockPretraining(blocks, token_layout(teacher.config).groups(), num_layers)

    def compute_loss(module, batch, progress):
        forcing = teacher_forcing_weight(progress, arguments.teacher_forcing)
        losses = module(batch["states"].float(), forcing)
        return sum(losses.values()), losses

    module = fit(
        module, activations, compute_loss, arguments,
        clip_apart=list(module.blocks.values()), description="blocks",
    )  # fmt: skip
    if PartialState().is_main_process:
        save_file(module.blocks.state_dict(), f"{arguments.output_dir}/blocks.safetensors")
        blocks[0].block.attention.config.save_pretrained(arguments.output_dir)  # the architecture
        finish_run(arguments.output_dir)
        remove_checkpoints(arguments.output_dir)


if __name__ == "__main__":
    main()

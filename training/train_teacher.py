"""Train a small DINOv2 with registers from scratch: a teacher where none can be downloaded.

accelerate launch training/train_teacher.py training/recipes/digits_teacher.yaml \
        --output_dir outputs/digits/teacher
"""

from dataclasses import dataclass, field

import torch
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    set_seed,
)

from raptor_hf.data import ImageViews, load_images, make_processor
from raptor_hf.dry_runs.plans import print_teacher_plan
from raptor_hf.loop.arguments import ComputeArguments, LoopArguments
from raptor_hf.loop.checkpoints import remove_checkpoints
from raptor_hf.loop.fit import StepResult, fit
from raptor_hf.runs.arguments import parse_arguments
from raptor_hf.runs.folder import finish_run, start_run
from raptor_hf.runs.processes import process_state, run_program


@dataclass
class Arguments(ComputeArguments, LoopArguments):
    """A teacher's architecture, its data, and the loop's arguments."""

    dataset: str = field(default="digits", metadata={"help": "digits, an image folder or a Hub id"})
    image_size: int = field(default=16, metadata={"help": "pixels"})
    patch_size: int = field(default=4, metadata={"help": "pixels"})
    hidden_size: int = 64
    num_hidden_layers: int = 12
    num_attention_heads: int = 4
    num_register_tokens: int = 4
    layerscale_value: float = 0.1
    drop_path_rate: float = field(default=0.1, metadata={"help": "stochastic depth"})
    label_smoothing: float = 0.1


def make_config(arguments: Arguments) -> Dinov2WithRegistersConfig:
    """The teacher's architecture."""
    names = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_register_tokens", "layerscale_value", "drop_path_rate")
    return Dinov2WithRegistersConfig(**{name: getattr(arguments, name) for name in names})


def main() -> None:
    """Train the teacher and save it with its image processor."""
    arguments = parse_arguments(Arguments)
    config = make_config(arguments)
    if arguments.dry_run:
        with torch.device("meta"):
            model = Dinov2WithRegistersForImageClassification(config)
        return print_teacher_plan(arguments, model.num_parameters())
    if start_run(arguments):
        return
    set_seed(arguments.seed)
    images = load_images(arguments.dataset, "train")
    config.id2label = dict(enumerate(images.features["label"].names))
    config.label2id = {name: label for label, name in config.id2label.items()}
    processor = make_processor(arguments.image_size)
    # every epoch sees each image in a view of its own
    views = -(-arguments.steps * arguments.batch_size // len(images)) + 1
    dataset = ImageViews(images, processor, views=views, seed=arguments.seed, plain_first=False)

    def compute_loss(model, batch, progress):
        logits = model(batch["pixel_values"]).logits
        loss = torch.nn.functional.cross_entropy(
            logits, batch["label"], label_smoothing=arguments.label_smoothing
        )
        right = (logits.argmax(-1) == batch["label"]).float()
        return StepResult(loss, {"accuracy": right.mean()})

    model = Dinov2WithRegistersForImageClassification(config)
    # nothing is masked, and several processes wait for the gradients of all that learns
    model.base_model.embeddings.mask_token.requires_grad_(False)
    arguments.set_up(model)
    model = fit(model, dataset, compute_loss, arguments, description="teacher")
    if process_state().is_main_process:
        model.save_pretrained(arguments.output_dir)
        processor.save_pretrained(arguments.output_dir)
        finish_run(arguments.output_dir)
        remove_checkpoints(arguments.output_dir)


if __name__ == "__main__":
    run_program(main)

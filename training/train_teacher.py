"""Train a small DINOv2 with registers from scratch: a teacher where none can be downloaded.

accelerate launch training/train_teacher.py training/recipes/digits_teacher.yaml \
        --output_dir outputs/digits/teacher
"""

from dataclasses import dataclass, field

import torch
import transformers

from raptor_hf import loop
from raptor_hf.data import ImageViews, list_images, load_images, make_processor
from raptor_hf.data.arguments import CropArguments, ReadingArguments
from raptor_hf.data.decoding import look_up
from raptor_hf.data.transforms import Augmentation
from raptor_hf.loop.arguments import ComputeArguments, LoopArguments
from raptor_hf.runs.arguments import check_not_negative, parse_arguments
from raptor_hf.runs.folder import finish_run, start_run
from raptor_hf.runs.processes import process_state, run_program
from raptor_hf.teachers import image_size


@dataclass
class Arguments:
    """A teacher's architecture and its data."""

    _argument_group_name = "teacher"

    dataset: str = field(default="digits", metadata={"help": "digits, an image folder or a Hub id"})
    hidden_size: int = 64
    num_attention_heads: int = 4
    drop_path_rate: float = field(default=0.1, metadata={"help": "stochastic depth"})
    label_smoothing: float = 0.1
    views: int = field(
        default=0,
        metadata={"help": "of every image: 0, a random one in each epoch; 1, the image as it is"},
    )

    def __post_init__(self):
        check_not_negative(self, "views")
        for name in ("drop_path_rate", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} must lie in [0, 1]; got {getattr(self, name)}.")


PARTS = (Arguments, CropArguments, ReadingArguments, ComputeArguments, LoopArguments)


def main(argv: list[str] | None = None) -> None:
    """Train the teacher and save it with its image processor."""
    parts = parse_arguments(*PARTS, argv=argv, defaults={"resolution": [16]})
    own, crops, reading, compute, training = parts
    pixels, width = reading.resolution
    if pixels != width:
        raise ValueError(f"A new teacher has square images; got --resolution {pixels} {width}.")

    # the architecture, the images, and the plan of the run
    config = transformers.Dinov2WithRegistersConfig(
        image_size=pixels,
        patch_size=4,
        hidden_size=own.hidden_size,
        num_hidden_layers=12,
        num_attention_heads=own.num_attention_heads,
        num_register_tokens=4,
        layerscale_value=0.1,
        drop_path_rate=own.drop_path_rate,
    )
    model_class = transformers.Dinov2WithRegistersForImageClassification
    images = load_images(own.dataset, "train", reading)
    with torch.device("meta"):
        number = model_class(config).num_parameters()
    seen = training.steps * training.batch_size
    process_state().print(
        f"{len(images):,} images, {seen:,} in {training.steps:,} steps; {number:,} parameters"
    )
    loop.check_training(training, len(images))
    if start_run(*parts, images={"images": list_images(own.dataset, images)}):
        return

    # the views: rows beyond the last are new ones
    transformers.set_seed(training.seed)
    processor = make_processor(pixels)
    dataset = ImageViews(
        images,
        processor,
        views=max(1, own.views),
        seed=training.seed,
        plain_first=own.views > 0,
        crops=None if own.dataset == "digits" else Augmentation.of(crops, image_size(processor)),
        reading=reading,
    )
    if len(dataset.class_names or ()) < 2 or dataset.labels.min() < 0:
        raise ValueError(f"{own.dataset} must have two classes at least, and one of every image.")
    config.id2label = dict(enumerate(dataset.class_names))
    config.label2id = {name: label for label, name in config.id2label.items()}

    # the model and its loss
    table = None if dataset.table is None else dataset.table.to(process_state().device)

    def compute_loss(model, batch, progress):
        logits = model(look_up(batch["pixel_values"], table)).logits
        loss = torch.nn.functional.cross_entropy(
            logits, batch["label"], label_smoothing=own.label_smoothing
        )
        right = (logits.argmax(-1) == batch["label"]).float()
        return loop.StepResult(loss, {"accuracy": right.mean()})

    model = model_class(config)
    # no image is masked, and several processes wait for the gradients of all trained parameters
    model.base_model.embeddings.mask_token.requires_grad_(False)
    loop.configure_compute(model, compute)

    # train; of every epoch each image is seen once, in a new view if `views` is 0
    new_views = own.views == 0
    model = loop.fit(model, dataset, compute_loss, training, new_views=new_views)
    if process_state().is_main_process:
        model.save_pretrained(training.output_dir)
        processor.save_pretrained(training.output_dir)
        finish_run(training.output_dir)
        loop.remove_checkpoints(training.output_dir)


if __name__ == "__main__":
    run_program(main)

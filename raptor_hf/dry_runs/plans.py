"""Dry runs: what a program would read, train and write, with sizes, from configurations alone.

No weights are loaded and nothing is written. Compute is counted (2 FLOP a multiply-add, matrix
products only); hours are that count divided by an assumed rate, which the plan states.
"""
# `print_training_plan` is over 40 lines: a plan is a list of lines, in the order of the page.

from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from ..activations.arguments import ActivationArguments, ImageArguments, check_source
from ..configuration_raptor import RaptorConfig
from ..data.arguments import CropArguments, ReadingArguments
from ..distillation.arguments import BlockArguments, ObjectiveArguments, ValidationArguments
from ..distillation.blocks import ARCHITECTURE
from ..distillation.compute import (
    application_flops,
    optimizer_flops,
    rollouts_per_step,
    teacher_layer,
)
from ..loop.arguments import LoopArguments
from ..loop.checkpoints import ADAMW_BYTES
from ..modeling_raptor import RaptorBlock
from ..probes.arguments import ProbeArguments
from ..probes.heads import head_grid
from ..runs.files import read_json, size
from ..runs.processes import process_state
from ..tasks.arguments import DenseArguments
from ..tasks.task import TASKS
from .describe import (
    TeacherFacts,
    cost,
    describe_folder,
    describe_images,
    describe_teacher,
    duration,
    measure_teacher,
    print_plan,
    teacher_facts,
)


def _planned_config(
    blocks: BlockArguments, teacher_config: PreTrainedConfig, folder: str | None
) -> RaptorConfig:
    """Configure the blocks that would be trained: those of a folder, if it exists, or new ones."""
    options = asdict(blocks)
    if folder and (Path(folder) / "config.json").exists():
        saved = RaptorConfig.from_pretrained(folder)
        options |= {name: getattr(saved, name) for name in ARCHITECTURE}
    return teacher_layer(teacher_config, **{name: options[name] for name in ARCHITECTURE})


def _describe_activations(path: str | Path, num_images: int) -> str:
    """Describe an activation dataset, if it is there, and how often a run goes through it."""
    text, manifest = describe_folder(path), Path(path) / "manifest.json"
    if manifest.exists():
        made = read_json(manifest)
        rows = made["num_images"] * made["views"]
        text += f", {rows:,} trajectories: {num_images / rows:.3g} epochs"
    return text


def _describe_source(
    source: ActivationArguments,
    images: ImageArguments,
    facts: TeacherFacts,
    num_images: int,
    layers: range,
) -> list[tuple[str, str]]:
    """Describe where the states of these layers come from, and what that costs over the run."""
    if source.online:
        layer = application_flops(teacher_layer(facts.config), facts.num_tokens)
        last = layers[-1]
        return [
            ("reads", describe_images(images.dataset, images.split, at_most=images.num_images)),
            ("", f"the teacher's layers 1 to {last}, online: {cost(num_images * last * layer)}"),
        ]
    num_bytes = num_images * len(layers) * facts.state_bytes
    return [
        ("reads", _describe_activations(source.activations, num_images)),
        ("", f"{size(num_bytes)} over the run"),
    ]


def _describe_validation(validation: ValidationArguments) -> list[tuple[str, str]]:
    """Describe on what a training would validate."""
    if not validation.validation_dataset:
        return []
    at_most = validation.validation_images or None
    images = describe_images(
        validation.validation_dataset, validation.validation_split, at_most=at_most
    )
    head = validation.validation_head or "the teacher's own, if it has one"
    return [
        ("validates", images),
        ("", f"linear head: {head}"),
    ]


def _measured_time(
    images: ImageArguments, facts: TeacherFacts, batch_size: int, flop: float, online: int
) -> list[tuple[str, str]]:
    """Describe how long that takes here, from the teacher's speed on random images.

    Args:
        flop: of the student's training.
        online: images that the teacher sees meanwhile.
    """
    rate = measure_teacher(facts, batch_size, images.precision)
    layer = application_flops(teacher_layer(facts.config), facts.num_tokens)
    flop_rate = rate * facts.config.num_hidden_layers * layer
    time = duration(flop / flop_rate + online / rate)
    return [
        ("measured", f"teacher {rate:,.1f} images/s ({process_state().device}): about {time}, "
                     "if reading images keeps up"),
    ]  # fmt: skip


def print_training_plan(
    title: str,
    spans: list[tuple[int, int]],
    *,
    source: ActivationArguments,
    images: ImageArguments,
    crops: CropArguments,
    reading: ReadingArguments,
    blocks: BlockArguments,
    objective: ObjectiveArguments,
    validation: ValidationArguments,
    loop: LoopArguments,
    folder: str | None = None,
    whole: bool = False,
) -> None:
    """Print what a training of blocks would read, train, compute and write.

    Args:
        spans: of every block, first and last layer.
        folder: of finished blocks to start from.
        whole: the spans are the phases of a Raptor, and must cover the teacher's layers.

    Raises:
        ValueError: spans that the teacher has not, or arguments that contradict each other.
    """
    check_source(source, images, crops)
    facts = teacher_facts(source.teacher, source.revision, reading.resolution)
    depth = facts.config.num_hidden_layers
    config = _planned_config(blocks, facts.config, folder)
    if whole:
        RaptorConfig(teacher_config=facts.config, phases=[stop - start for start, stop in spans])
    for start, stop in spans:
        if not 0 <= start < stop <= depth:
            raise ValueError(f"A span needs 0 ≤ start < stop ≤ {depth}; got {start}-{stop}.")
    with torch.device("meta"):
        trained = [RaptorBlock(config, span) for span in spans]
    parameters = sum(weight.numel() for block in trained for weight in block.parameters())
    layers = range(min(start for start, _ in spans), max(stop for _, stop in spans) + 1)
    applications = sum(stop - start for start, stop in spans)
    passes = rollouts_per_step(objective, loop.steps)
    number = loop.steps * loop.batch_size
    flop = 3 * passes * number * applications
    flop *= application_flops(config, facts.num_tokens, loop.batch_size)
    flop += loop.steps * optimizer_flops(loop.optimizer, config, len(spans))
    lines = [("teacher", describe_teacher(source.teacher, facts))]
    lines += _describe_source(source, images, facts, number, layers)
    if folder:
        lines.append(("", describe_folder(folder, absent="not there yet, taken for default ones")))
    lines += _describe_validation(validation)
    lines += [
        ("trains", f"{len(spans)} blocks, {config.ffn} of {config.ffn_size}, "
                   f"{parameters / 1e6:.3g} M parameters: layers "
                   + ", ".join("-".join(map(str, span)) for span in spans)),
        ("", f"{loop.steps:,} steps of {loop.batch_size} = {number:,} images, "
             f"seed {loop.seed}, {objective.objective}, {objective.loss}"),
        ("compute", f"{passes:.3g} × {applications} applications a step; {cost(flop)}"),
        *_measured_time(images, facts, loop.batch_size, flop, number if source.online else 0),
        ("writes", f"{loop.output_dir}: weights {size(4 * parameters)}, while it trains "
                   f"checkpoints of {size(ADAMW_BYTES * parameters)}"),
    ]  # fmt: skip
    print_plan(title, lines)


def print_probe_plan(
    recipe: ProbeArguments,
    crops: CropArguments,
    dense: DenseArguments,
    reading: ReadingArguments,
    loop: LoopArguments,
    folders: dict[str, str],
) -> None:
    """Print what `evaluation/probe.py` would do.

    Args:
        folders: of the models by their names, the teacher's first.
    """
    task = TASKS[recipe.task]
    heads = head_grid(recipe, loop, task)
    train, test = (
        describe_images(
            recipe.dataset, split, at_most=at_most, task=task, reading=reading, dense=dense
        )
        for split, at_most in (
            (recipe.train_split, recipe.train_images),
            (recipe.test_split, recipe.test_images),
        )
    )
    lines = [(name, describe_folder(folder, absent="no such folder; taken for a Hub id"))
             for name, folder in folders.items()]  # fmt: skip
    teacher = next(iter(folders.values()))
    facts = teacher_facts(teacher, resolution=reading.resolution)
    steps = f"{recipe.epochs} epochs" if loop.steps is None else f"{loop.steps:,} steps"
    kept = "in random views" if crops.crop_scale else "as features that are stored once"
    lines += [
        ("", describe_teacher(teacher, facts)),
        ("reads", f"{train}, {kept}"),
        ("", test),
        ("trains", f"{len(heads)} linear heads a model: {steps}, {loop.batch_size} images a step"),
        ("", "; ".join(map(str, heads))),
        ("writes", f"{loop.output_dir}/results: a JSON file a model"),
    ]  # fmt: skip
    print_plan(f"Probe frozen backbones: {recipe.task}", lines)


def print_teacher_plan(
    dataset: str, num_layers: int, num_parameters: int, loop: LoopArguments
) -> None:
    """Print what `train_teacher.py` would do."""
    images = loop.steps * loop.batch_size
    lines = [
        ("reads", describe_images(dataset, "train")),
        ("trains", f"{num_parameters:,} parameters, {num_layers} layers"),
        ("", f"{loop.steps:,} steps of {loop.batch_size} = {images:,} images"),
        ("writes", f"{loop.output_dir}: {size(4 * num_parameters)}"),
    ]
    print_plan("Train a teacher", lines)


def print_study_plan(
    title: str, folders: dict[str, str], reads: list[str], output_dir: str
) -> None:
    """Print what a program that only looks at models and images would do.

    Args:
        folders: folder or Hub id of every model by its name.
        reads: the images, a line each (`describe_images`).
    """
    lines = [(name, describe_folder(folder, absent="no such folder; taken for a Hub id"))
             for name, folder in folders.items()]  # fmt: skip
    lines += [("reads" if not number else "", text) for number, text in enumerate(reads)]
    print_plan(title, [*lines, ("writes", output_dir)])

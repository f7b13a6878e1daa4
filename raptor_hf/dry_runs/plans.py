"""Dry runs: what a program would read, train and write, with sizes, from configurations alone.

No weights are loaded and nothing is written. Compute is counted (2 FLOP a multiply-add, matrix
products only); hours are that count divided by an assumed rate, which the plan states.
"""

from pathlib import Path

import torch
from transformers import PreTrainedConfig

from ..configuration_raptor import RaptorConfig
from ..distillation.compute import (
    application_flops,
    optimizer_flops,
    rollouts_per_step,
    teacher_layer,
)
from ..loop.checkpoints import ADAMW_BYTES
from ..modeling_raptor import RaptorBlock
from ..probes.arguments import candidates_of
from ..runs.files import read_json, size
from ..tasks.task import TASKS
from .describe import (
    TeacherFacts,
    cost,
    describe_folder,
    describe_images,
    describe_teacher,
    print_plan,
    teacher_facts,
)


def planned_config(arguments, teacher_config: PreTrainedConfig) -> RaptorConfig:
    """The blocks that would be trained: those of `--blocks`, where they are there, or new ones."""
    options = arguments.block_options()
    blocks = getattr(arguments, "blocks", None)
    if blocks and (Path(blocks) / "config.json").exists():
        saved = RaptorConfig.from_pretrained(blocks)
        options |= {name: getattr(saved, name) for name in ("ffn", "intermediate_size")}
    options = {name: options[name] for name in ("ffn", "intermediate_size", "depth_scaling")}
    phases = [teacher_config.num_hidden_layers]
    return RaptorConfig(teacher_config=teacher_config, phases=phases, **options)


def describe_activations(path: str | Path, num_images: int) -> str:
    """An activation dataset, as far as it is there, and how often a run goes through it."""
    text, manifest = describe_folder(path), Path(path) / "manifest.json"
    if manifest.exists():
        made = read_json(manifest)
        rows = made["num_images"] * made["views"]
        text += f", {rows:,} trajectories: {num_images / rows:.3g} epochs"
    return text


def describe_source(
    arguments, facts: TeacherFacts, num_images: int, first: int, last: int
) -> list[tuple[str, str]]:
    """Where the states of the layers first … last come from, and what that costs over the run."""
    if arguments.online:
        layer = application_flops(teacher_layer(facts.config), facts.num_tokens)
        return [
            ("reads", describe_images(arguments.dataset, arguments.split)),
            ("", f"the teacher's layers 1 to {last}, online: {cost(num_images * last * layer)}"),
        ]
    num_bytes = num_images * (last - first + 1) * facts.state_bytes
    return [
        ("reads", describe_activations(arguments.activations, num_images)),
        ("", f"{size(num_bytes)} over the run"),
    ]


def print_training_plan(arguments, chains: list[list[tuple[int, int]]]) -> None:
    """What `pretrain_blocks.py` (a chain a span) or `distill_raptor.py` (one chain) would do."""
    arguments.check_source()
    facts = teacher_facts(arguments.teacher, arguments.revision)
    depth = facts.config.num_hidden_layers
    blocks = getattr(arguments, "blocks", None)
    config = planned_config(arguments, facts.config)
    with torch.device("meta"):
        block_parameters = sum(weight.numel() for weight in RaptorBlock(config).parameters())
    spans = [span for chain in chains for span in chain]
    if hasattr(arguments, "phases"):  # a whole Raptor: its phases must cover the teacher
        RaptorConfig(teacher_config=facts.config, phases=[stop - start for start, stop in spans])
    for start, stop in spans:
        if not 0 <= start < stop <= depth:
            raise ValueError(f"A span needs 0 ≤ start < stop ≤ {depth}; got {start}-{stop}.")
    parameters = len(spans) * block_parameters
    applications = sum(stop - start for start, stop in spans)
    passes = rollouts_per_step(arguments, arguments.steps)
    images = arguments.steps * arguments.batch_size
    flop = 3 * passes * images * applications * application_flops(config, facts.num_tokens)
    flop += arguments.steps * optimizer_flops(arguments.optimizer, config, len(spans))
    first, last = min(start for start, _ in spans), max(stop for _, stop in spans)
    lines = [("teacher", describe_teacher(arguments.teacher, facts))]
    lines += describe_source(arguments, facts, images, first, last)
    if blocks:
        lines.append(("", describe_folder(blocks, absent="not there yet, taken for default ones")))
    if arguments.validation_dataset:
        images_of = describe_images(arguments.validation_dataset, arguments.validation_split)
        lines.append(("validates", f"{images_of}, at most {arguments.validation_images:,}"))
        head = arguments.validation_head or "the teacher's own, if it has one"
        lines.append(("", f"linear head: {head}"))
    lines += [
        ("trains", f"{len(spans)} blocks, {config.ffn} of {config.ffn_size}, "
                   f"{parameters / 1e6:.3g} M parameters: layers "
                   + ", ".join("-".join(map(str, span)) for span in spans)),
        ("", f"{arguments.steps:,} steps of {arguments.batch_size} = {images:,} images, "
             f"seed {arguments.seed}, {arguments.objective}, {arguments.loss}"),
        ("compute", f"{passes:.3g} × {applications} applications a step; {cost(flop)}"),
        ("writes", f"{arguments.output_dir}: weights {size(4 * parameters)}, while it trains "
                   f"checkpoints of {size(ADAMW_BYTES * parameters)}"),
    ]  # fmt: skip
    print_plan("Distil a Raptor" if hasattr(arguments, "phases") else "Train blocks", lines)


def print_probe_plan(arguments, folders: dict[str, str]) -> None:
    """What `evaluation/probe.py` would do."""
    train, test = arguments.train_split, arguments.test_split
    heads = candidates_of(arguments, TASKS[arguments.task])
    lines = [(name, describe_folder(folder, absent="no such folder; taken for a Hub id"))
             for name, folder in folders.items()]  # fmt: skip
    resolution = tuple(arguments.resolution) or None
    facts = teacher_facts(arguments.teacher, resolution=resolution)
    steps = (
        f"{arguments.epochs} epochs" if arguments.steps is None else f"{arguments.steps:,} steps"
    )
    kept = "in random views" if arguments.crop_scale else "as features that are stored once"
    lines += [
        ("", describe_teacher(arguments.teacher, facts)),
        ("reads", f"{describe_images(arguments.dataset, train)}, {kept}"),
        ("", describe_images(arguments.dataset, test)),
        ("trains", f"{len(heads)} linear heads a model: {steps}, {arguments.batch_size} images "
                   "a step"),
        ("", "; ".join(map(str, heads))),
        ("writes", f"{arguments.output_dir}/results: a JSON file a model"),
    ]  # fmt: skip
    print_plan(f"Probe frozen backbones: {arguments.task}", lines)


def print_teacher_plan(arguments, num_parameters: int) -> None:
    """What `train_teacher.py` would do."""
    images = arguments.steps * arguments.batch_size
    lines = [
        ("reads", describe_images(arguments.dataset, "train")),
        ("trains", f"{num_parameters:,} parameters, {arguments.num_hidden_layers} layers"),
        ("", f"{arguments.steps:,} steps of {arguments.batch_size} = {images:,} images"),
        ("writes", f"{arguments.output_dir}: {size(4 * num_parameters)}"),
    ]
    print_plan("Train a teacher", lines)

"""Dry runs: what a program would read, train and write, with sizes, from configurations alone.

No weights are loaded and nothing is written. Compute is counted (2 FLOP a multiply-add, matrix
products only); hours are that count divided by an assumed rate, which the plan states.
"""

import os
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from transformers import AutoConfig, PreTrainedConfig

from ..configuration_raptor import RaptorConfig, token_layout
from ..distillation.objective import ObjectiveArguments
from ..loop.checkpoints import ADAMW_BYTES
from ..modeling_raptor import PatchFrame, RaptorBlock
from ..probes.arguments import candidates_of
from ..runs.folder import read_json, size
from ..runs.processes import process_state
from ..tasks.digit_scenes import NUMBER
from ..tasks.task import TASKS
from ..teachers import load_processor

ASSUMED_TFLOPS = {"float32": 50, "bfloat16": 400}  # sustained on one H100; assumed, not measured


class TeacherFacts(NamedTuple):
    """What a plan needs to know of a teacher."""

    config: PreTrainedConfig
    height: int
    width: int
    num_tokens: int
    num_prefix_tokens: int

    @property
    def state_bytes(self) -> int:
        """Bytes of one state of one image in float16."""
        return 2 * self.num_tokens * self.config.hidden_size


def teacher_facts(
    name_or_path: str, revision: str | None = None, resolution: tuple[int, int] | None = None
) -> TeacherFacts:
    """Configuration and token count of a teacher, for images as its processor makes them.

    Args:
        resolution: height and width of the images, if the processor doesn't make them.

    Raises:
        OSError: no such model.
    """
    config = AutoConfig.from_pretrained(name_or_path, revision=revision)
    processor = load_processor(name_or_path, revision)
    pixel_values = processor(Image.new("RGB", (640, 480)), return_tensors="pt")["pixel_values"]
    height, width = resolution or pixel_values.shape[-2:]
    rows, columns = PatchFrame.of((height, width), config).grid
    prefix = token_layout(config).num_prefix_tokens
    return TeacherFacts(config, height, width, prefix + rows * columns, prefix)


def application_flops(config: RaptorConfig, num_tokens: int) -> int:
    """FLOP of one application of a block to one image, forward only."""
    size = config.hidden_size
    linear = 4 * size * size + (3 if config.ffn == "swiglu" else 2) * size * config.ffn_size
    return 2 * num_tokens * linear + 4 * num_tokens * num_tokens * size


def optimizer_flops(optimizer: str, config: RaptorConfig, num_blocks: int) -> int:
    """FLOP of the matrix products of an update: Muon's five Newton-Schulz iterations; AdamW's 0.

    For a matrix of m ≤ n: X·Xᵀ, the square of that, and its product with X.
    """
    if optimizer != "muon":
        return 0
    size, hidden = config.hidden_size, config.ffn_size
    fc1 = (2 if config.ffn == "swiglu" else 1) * hidden
    shapes = [sorted(s) for s in ((size, 3 * size), (size, size), (size, fc1), (hidden, size))]
    return num_blocks * sum(5 * (4 * m * m * n + 2 * m**3) for m, n in shapes)


def teacher_layer(config: PreTrainedConfig) -> RaptorConfig:
    """A configuration whose block costs what a layer of the teacher does."""
    width = getattr(config, "mlp_ratio", 4) * config.hidden_size
    phases = [config.num_hidden_layers]
    return RaptorConfig(teacher_config=config, phases=phases, intermediate_size=width)


def rollouts_per_step(objective: ObjectiveArguments, steps: int) -> float:
    """How often a step goes through a chain on average: with forcing and without may be both."""
    if objective.annealing == "drawn":
        return 1.0
    half = [objective.forcing(step / steps) for step in range(steps)]
    return sum((forcing > 0) + (forcing < 1) for forcing in half) / max(1, steps)


def cost(flop: float) -> str:
    """A number of FLOP, and how long it takes at the assumed rates."""
    times = []
    for dtype, rate in ASSUMED_TFLOPS.items():
        seconds = flop / (rate * 1e12)
        time = f"{seconds / 3600:.3g} h" if seconds > 600 else f"{seconds:.3g} s"
        times.append(f"{time} at {rate} TFLOP/s ({dtype})")
    return f"{flop:.3g} FLOP: {', '.join(times)}, if one GPU sustains that"


def describe_teacher(name_or_path: str, facts: TeacherFacts) -> str:
    """A teacher in one line."""
    config = facts.config
    return (
        f"{name_or_path}: {config.model_type}, {config.num_hidden_layers} layers × "
        f"{config.hidden_size} channels, {facts.num_tokens} tokens at {facts.height}×{facts.width}"
    )


def describe_folder(path: str | Path, *, absent: str = "not there yet") -> str:
    """A folder and what its files take, or that it is missing."""
    path = Path(path)
    if not path.is_dir():
        return f"{path}: {absent}"
    files = [file for file in path.rglob("*") if file.is_file()]
    return f"{path}: {len(files):,} files, {size(sum(file.stat().st_size for file in files))}"


def count_images(dataset: str, split: str) -> int | None:
    """Images of a split of a local dataset; None for a Hub dataset or one that is missing."""
    embedded = {"digits": {"train": 1437, "test": 360}, "digit_scenes": NUMBER}
    if dataset in embedded:
        return embedded[dataset].get(split)
    table = Path(dataset) / "data" / f"nyu2_{split}.csv"
    if table.is_file():
        return len(table.read_text().splitlines())
    ade20k = Path(dataset) / "images" / split
    folder = ade20k if ade20k.is_dir() else Path(dataset) / split
    if not folder.is_dir():
        return None
    return sum(
        len([name for name in names if not name.startswith(".")]) for _, _, names in os.walk(folder)
    )


def describe_images(dataset: str, split: str) -> str:
    """A dataset's split and its number of images, as far as they can be told offline."""
    number = count_images(dataset, split)
    if number is None:
        known = "no such folder; taken for a Hub dataset, which a dry run does not download"
        return f"{dataset} ({split}): {known}"
    return f"{dataset} ({split}): {number:,} images"


def print_plan(title: str, lines: list[tuple[str, str]]) -> None:
    """Print a plan, one topic a line; of several processes the main one does."""
    if not process_state().is_main_process:
        return
    print(f"{title}\nA dry run: nothing is trained, nothing is written.")
    for topic, text in lines:
        print(f"  {topic:<12} {text}")


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

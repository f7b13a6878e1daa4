"""The only training loop: teacher, blocks, Raptors and probes all go through `fit`.

Everything random is a function of (seed, step): the order of the data and what a step draws. So a
run that is stopped and resumed computes what an uninterrupted one does, bit for bit.

`fit` is one long function on purpose: the order of its steps is what it is about.
"""

import dataclasses
import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from .data import keep_batch
from .loss_log import LossLog
from .runs import progress_bar


@dataclass(kw_only=True)
class LoopArguments:
    """Arguments of every training program."""

    output_dir: str = field(metadata={"help": "folder of the result, its log and its checkpoints"})
    resume: bool = field(
        default=False, metadata={"help": "go on with an unfinished run in output_dir"}
    )
    steps: int = field(default=1000, metadata={"help": "optimiser updates"})
    batch_size: int = field(default=64, metadata={"help": "images a step, over all processes"})
    learning_rate: float = field(default=3e-4, metadata={"help": "peak learning rate of AdamW"})
    final_learning_rate: float = field(default=1e-6, metadata={"help": "where the cosine ends"})
    weight_decay: float = 1e-4
    warmup_steps: int = field(default=50, metadata={"help": "steps of linear warm-up"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradient clipping"})
    seed: int = field(default=0, metadata={"help": "seed of initialisation, data order and noise"})
    log_every: int = field(default=20, metadata={"help": "steps between two lines of the log"})
    checkpoint_every: int = field(default=200, metadata={"help": "steps between two checkpoints"})
    num_workers: int = field(
        default=0, metadata={"help": "processes that prepare batches ahead; images need several"}
    )
    report_to: Literal["tensorboard", "wandb", "trackio", "none"] = field(
        default="tensorboard", metadata={"help": "a tracker of Accelerate, or none"}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "print what would be read, trained, written; do nothing"}
    )


class StepSampler:
    """Row numbers for the steps first … steps − 1: shuffled epochs without their ragged ends.

    With `new_views` the n rows are numbered on from epoch to epoch, e·n … (e + 1)·n − 1.
    """

    drop_last = True

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        *,
        seed: int,
        first: int,
        steps: int,
        new_views: bool = False,
    ):
        if num_rows < batch_size:
            raise ValueError(
                f"A batch of {batch_size} needs at least as many rows; the dataset has {num_rows}."
            )
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self.first, self.steps, self.new_views = first, steps, new_views

    def __len__(self) -> int:
        return self.steps - self.first

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.num_rows // self.batch_size
        shuffled_epoch = None
        for step in range(self.first, self.steps):
            epoch, batch = divmod(step, batches)
            if epoch != shuffled_epoch:
                order = np.random.default_rng((self.seed, epoch)).permutation(self.num_rows)
                order += self.new_views * epoch * self.num_rows
                shuffled_epoch = epoch
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()


def fit(
    module: nn.Module,
    dataset: Dataset,
    compute_loss: Callable[[nn.Module, dict, float], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    arguments: LoopArguments,
    *,
    clip_apart: list[nn.Module] | None = None,
    learning_rates: list[float] | None = None,
    new_views: bool = False,
    validate: Callable[[], dict[str, float]] | None = None,
    validate_every: int = 0,
    description: str = "train",
) -> nn.Module:
    """Train a module with AdamW, linear warm-up, a cosine schedule and gradient clipping.

    Args:
        module: what is trained; parameters that need no gradient are left alone.
        dataset: map-style, with `__getitems__(rows)` that gives a batch (a dict of tensors).
        compute_loss: (module, batch, progress in [0, 1)) to (loss, scalars for the log).
        arguments: see `LoopArguments`; checkpoints and `log.jsonl` go to its `output_dir`.
        clip_apart: parts of the module whose gradients are clipped each for itself.
        learning_rates: peak rates of these parts, instead of one for the whole module.
        new_views: ask the dataset for other rows in every epoch (`StepSampler`).
        validate: scalars for the log, measured without gradients and without touching the module.
        validate_every: steps between two validations; the last step is always validated.
        description: name on the progress bar.

    Returns:
        The trained module.

    Raises:
        FloatingPointError: the loss is NaN or infinite.
        ValueError: fewer rows than a batch, or a batch that the processes can't share evenly.
    """
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator(arguments)
    checkpoint = newest_checkpoint(output_dir)
    first = int(checkpoint.name.removeprefix("step_")) if checkpoint else 0
    sampler = StepSampler(
        len(dataset),
        arguments.batch_size,
        seed=arguments.seed,
        first=first,
        steps=arguments.steps,
        new_views=new_views,
    )
    loader = DataLoader(
        dataset, batch_sampler=sampler, collate_fn=keep_batch, num_workers=arguments.num_workers
    )
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    clipped = [list(part.parameters()) for part in clip_apart] if clip_apart else [trained]
    groups = [trained] if learning_rates is None else clipped
    module, loader, *others = accelerator.prepare(
        module, loader, *make_optimizer(groups, learning_rates, arguments)
    )
    optimizer, schedule = others
    if checkpoint:
        accelerator.print(f"{output_dir}: going on from step {first}")
        accelerator.load_state(str(checkpoint))
    log = LossLog(accelerator, output_dir / "log.jsonl", first)
    bar = progress_bar(
        description, arguments.steps, initial=first, enabled=accelerator.is_main_process
    )

    def run_validation(done: int) -> None:
        module.eval()
        with torch.no_grad():
            scalars = validate()
        module.train()
        log.write(done, scalars)
        bar.set_postfix({name: f"{value:.3f}" for name, value in list(scalars.items())[-2:]})

    module.train()
    for step, batch in enumerate(loader, start=first):
        seed_step(arguments.seed, step, accelerator.process_index)
        loss, scalars = compute_loss(module, batch, step / arguments.steps)
        check_loss(loss.item(), step, batch, output_dir)
        accelerator.backward(loss)
        for parameters in clipped:
            accelerator.clip_grad_norm_(parameters, arguments.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.update()
        done = step + 1
        if done % arguments.log_every == 0 or done == arguments.steps:
            means = log.mean({"loss": loss, **scalars})
            log.write(done, {**means, "learning_rate": schedule.get_last_lr()[0]})
            bar.set_postfix(loss=f"{loss.item():.4g}")
        if validate and validate_every and done % validate_every == 0 and done < arguments.steps:
            run_validation(done)
        if done % arguments.checkpoint_every == 0 and done < arguments.steps:
            save_checkpoint(accelerator, output_dir, done)
    if validate:
        run_validation(arguments.steps)
    bar.close()
    # not end_training, which would leave no process group to what comes after
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()
    return accelerator.unwrap_model(module).eval()


def make_accelerator(arguments: LoopArguments) -> Accelerator:
    """Accelerate as its environment sets it up; the processes share a batch.

    Raises:
        ValueError: a batch that the processes can't share evenly.
        ImportError: the tracker of `report_to` is not installed.
    """
    tracker = arguments.report_to
    # Accelerate itself only warns, and then a long run is not tracked
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise ImportError(
            f"report_to={tracker!r} needs the package {tracker}: pip install {tracker}, or choose "
            "--report_to none (log.jsonl is written in any case)."
        )
    accelerator = Accelerator(
        log_with=None if tracker == "none" else tracker,
        project_dir=arguments.output_dir,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    if arguments.batch_size % accelerator.num_processes:
        raise ValueError(
            f"batch_size must be a multiple of the {accelerator.num_processes} processes; "
            f"got {arguments.batch_size}."
        )
    name = Path(arguments.output_dir).name
    accelerator.init_trackers(
        "logs" if tracker == "tensorboard" else "raptor_hf",  # a folder there, a project elsewhere
        config={key: str(value) for key, value in dataclasses.asdict(arguments).items()},
        init_kwargs={
            "wandb": {"name": name, "dir": arguments.output_dir},
            "trackio": {"name": name},
        },
    )
    return accelerator


def make_optimizer(
    groups: list[list[nn.Parameter]], learning_rates: list[float] | None, arguments: LoopArguments
):
    """AdamW (fused: several times faster), and its warm-up and cosine.

    The schedule is a factor: each group keeps its share of `arguments.learning_rate` throughout.
    """
    rates = learning_rates or [arguments.learning_rate] * len(groups)
    optimizer = torch.optim.AdamW(
        [{"params": group, "lr": rate} for group, rate in zip(groups, rates, strict=True)],
        lr=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        fused=True,
    )
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, arguments.warmup_steps, arguments.steps, min_lr=arguments.final_learning_rate
    )
    return optimizer, schedule


def check_loss(loss: float, step: int, batch: dict[str, torch.Tensor], output_dir: Path) -> None:
    """Stop at a loss that is NaN or infinite, before it reaches the weights."""
    if not math.isfinite(loss):
        images = batch["image_id"].tolist() if "image_id" in batch else "unknown"
        raise FloatingPointError(
            f"The loss is {loss} at step {step} (images {images}). The last good checkpoint is "
            f"kept in {output_dir}; try a smaller --learning_rate or more --warmup_steps."
        )


def seed_step(seed: int, step: int, process_index: int) -> None:
    """Make everything that a step draws a function of (seed, step, process)."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, process_index)).generate_state(1)[0]))


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint with the most steps, if any; a folder gets its name only when complete."""
    return max((output_dir / "checkpoints").glob("step_*"), default=None)


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int) -> None:
    """Write weights, optimiser and schedule under a temporary name, rename, drop older ones."""
    folder = output_dir / "checkpoints"
    temporary = folder / "unfinished"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        older = sorted(folder.glob("step_*"))
        os.replace(temporary, folder / f"step_{step:08d}")
        for checkpoint in older:
            shutil.rmtree(checkpoint)


def remove_checkpoints(output_dir: str | Path) -> None:
    """Delete the checkpoints of a run whose result is saved."""
    shutil.rmtree(Path(output_dir) / "checkpoints", ignore_errors=True)

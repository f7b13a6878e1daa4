"""The only training loop: teacher, blocks, Raptors and probes all go through `fit`.

Everything random is a function of (seed, step): the order of the data and what a step draws. So a
run that is stopped and resumed computes what an uninterrupted one does, bit for bit, and several
processes learn from the same batches as one.

A GPU is never waited for: what a step tells of itself is read one step later, when the next one is
under way, and an update that is not finite is left out by the device itself.

`fit` is one long function on purpose: the order of its steps is what it is about.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..data import keep_batch
from ..metrics import RSquared, compute_over_processes
from ..runs.files import read_json, write_json
from ..runs.processes import Interrupted, StopSignals, ignore_stop_signals
from ..runs.startup import mark, startup_times
from .arguments import LoopArguments
from .checkpoints import resume, save_checkpoint
from .engine import Engine
from .guards import DivergenceGuard, check_finite, memory_in_words
from .log import LossLog
from .numbers import StepNumbers, StepResult
from .sampler import StepSampler


def fit(
    module: nn.Module,
    dataset: Dataset,
    compute_loss: Callable[[nn.Module, dict, float], StepResult],
    arguments: LoopArguments,
    *,
    clip_apart: list[nn.Module] | None = None,
    learning_rates: list[float] | None = None,
    kind: Callable[[float], Hashable | None] | None = None,
    new_views: bool = False,
    validate: Callable[[], dict[str, float]] | None = None,
    validate_every: int = 0,
    explain: Callable[[nn.Module, dict], str | None] | None = None,
    tracked: dict | None = None,
    description: str = "train",
) -> nn.Module:
    """Train a module with AdamW or Muon, linear warm-up, a cosine schedule and gradient clipping.

    Args:
        module: what is trained; parameters that need no gradient are left alone.
        dataset: map-style, with `__getitems__(rows)` that gives a batch (a dict of tensors).
        compute_loss: (module, batch, progress in [0, 1)) to the loss, a mean over the batch's
            images, and what to log of it (`StepResult`).
        arguments: see `LoopArguments`; checkpoints, `log.jsonl` and `training.png` go to its
            `output_dir`.
        clip_apart: parts of the module whose gradients are clipped each for itself.
        learning_rates: peak rates of these parts, instead of one for the whole module.
        kind: (progress) to what `compute_loss` does beside the batch, None for a step that draws
            random numbers; without it no step is recorded for `cuda_graphs`.
        new_views: ask the dataset for other rows in every epoch (`StepSampler`).
        validate: scalars for the log, measured without gradients and without touching the module.
        validate_every: steps between two validations; the last step is always validated.
        explain: says what is not finite in (module, batch), where the loss is not.
        tracked: what a tracker stores of the run; default: `arguments`.
        description: name on the progress bar.

    Returns:
        The trained module.

    Raises:
        Interrupted: a signal asked to stop, and the state was saved.
        FloatingPointError: the loss or a gradient is NaN or infinite.
        MemoryError: not enough memory.
        OSError: a checkpoint can't be written.
        ValueError: fewer rows than a batch, or a batch that the processes can't share.
    """
    mark("teacher, images, blocks")
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    engine = Engine(module, arguments, clip_apart=clip_apart, learning_rates=learning_rates)
    accelerator, share = engine.accelerator, engine.share
    accelerator.print(f"{description}: {share}", flush=True)
    first = resume(accelerator, output_dir)
    sampler = StepSampler(
        len(dataset),
        share,
        seed=arguments.seed,
        first=first,
        steps=arguments.steps,
        new_views=new_views,
    )
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=keep_batch,
        num_workers=arguments.num_workers,
        worker_init_fn=ignore_stop_signals,
        pin_memory=accelerator.device.type == "cuda",
    )
    engine.start_trackers(arguments, first, tracked)
    log = LossLog(
        accelerator,
        output_dir,
        first=first,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        description=description,
    )
    divergence, weights = DivergenceGuard(), share.weights()
    skipped: set[int] = set()  # images that can't be read

    def settle(step: int, numbers: StepNumbers, batches: list[dict]) -> tuple[int, dict]:
        stop, left_out, scalars = numbers.read()
        check_finite(engine, scalars["loss"], left_out, batches, step=step, explain=explain)
        if accelerator.is_main_process:
            divergence.check(scalars["loss"], step)
        return stop, scalars

    def run_validation(done: int) -> None:
        engine.update_module()
        module.eval()
        with torch.no_grad():
            scalars = validate()
        module.train()
        log.write(done, scalars, show=2)

    engine.model.train()
    learn = engine.learner(compute_loss, kind)
    mark("optimiser, checkpoint, log")
    with (
        StopSignals() as signals,
        memory_in_words(share.largest_part, module),
        _workers_ended(iter(loader)) as batches,
    ):
        waiting: deque[tuple[int, StepNumbers, list[dict]]] = deque()
        for step in range(first, arguments.steps):
            done = step + 1
            last = done == arguments.steps
            logging = last or _is_due(arguments.log_every, done)
            validating = validate and _is_due(validate_every, done) and not last
            saving = last or _is_due(arguments.checkpoint_every, done)
            timing = arguments.timings and step == first
            scalars, statistics, seen, stop = {"loss": 0.0}, [], [], 0
            _seed_step(arguments.seed, step, accelerator.process_index)
            parts = islice(batches, share.num_parts)
            for part, (weight, batch) in enumerate(zip(weights, parts, strict=True), start=1):
                if step == first and part == 1:
                    mark("workers, first batch")
                skipped.update(batch.pop("skipped", torch.empty(0)).tolist())
                seen.append(batch)
                batch = send_to_device(batch, accelerator.device, non_blocking=True)
                result = learn(batch, step / arguments.steps, weight)
                for name, value in {"loss": result.loss, **result.scalars}.items():
                    scalars[name] = scalars.get(name, 0.0) + weight * value.float()
                if logging:
                    statistics.append({n: count() for n, count in result.statistics.items()})
                del result  # it holds predictions, which the next ones need the memory of
            numbers = StepNumbers(accelerator, signals.received, scalars)
            numbers.send(left_out=engine.update(numbers.loss))
            waiting.append((step, numbers, seen))
            wanted = logging or validating or saving or timing
            while waiting and (len(waiting) > 1 or wanted or stop):
                told, scalars = settle(*waiting.popleft())
                stop = stop or told
            if timing:
                mark("compiling, first step")
                accelerator.print(startup_times(), flush=True)
            log.advance()
            if logging:
                rate, speed = engine.learning_rate(), log.images_per_second()
                scalars |= _r_squared(statistics)
                log.write(done, {**scalars, "learning_rate": rate, "images_per_second": speed})
            with log.paused():
                if validating:
                    run_validation(done)
                if stop or saving:
                    save_checkpoint(accelerator, output_dir, done, arguments.keep)
                    _list_skipped(accelerator, output_dir, dataset, skipped)
                    log.draw(now=bool(stop))
            if stop:
                log.close()
                raise Interrupted(stop, f"The state after step {done:,} is saved.")
    if validate:
        run_validation(arguments.steps)
    log.draw()
    log.close()
    engine.update_module()
    return module.eval()


def _list_skipped(
    accelerator: Accelerator, output_dir: Path, dataset: Dataset, image_ids: set[int]
) -> None:
    """List the images that were left out in `skipped_images.json`, beside earlier ones."""
    image_ids = set(gather_object(sorted(image_ids)))
    if image_ids and accelerator.is_main_process:
        path = output_dir / "skipped_images.json"
        before = read_json(path)["images"] if path.exists() else []
        now = [
            {"image_id": image, "path": dataset.public_path(image)} for image in sorted(image_ids)
        ]
        listed = {entry["image_id"]: entry for entry in [*before, *now]}
        write_json(path, {"images": [listed[image] for image in sorted(listed)]})


def _is_due(every: int, done: int) -> bool:
    """Return whether what happens after every so many steps happens after this one; 0: never."""
    return every > 0 and done % every == 0


@contextmanager
def _workers_ended(batches: Iterator) -> Iterator[Iterator]:
    """End the workers of a DataLoader's iterator, whatever happens.

    They don't listen to signals, so what Python does with them at its exit would wait for ever.
    """
    try:
        yield batches
    finally:
        if hasattr(batches, "_shutdown_workers"):  # there is no public way
            batches._shutdown_workers()


def _r_squared(statistics: list[dict[str, dict]]) -> dict[str, float]:
    """Return R² of every chain on this batch, over all its tokens, and the mean over chains.

    Args:
        statistics: for every part of the batch, rows of `state_statistics` by chain.
    """
    scores = {}
    for name in statistics[0]:
        rows = [part[name] for part in statistics]
        metric = RSquared(keep_in_memory=True)
        scores[f"train/{name}/r2"] = compute_over_processes(metric, rows)["mean"]["all"]
    return {**scores, "train/r2": float(np.mean(list(scores.values())))} if scores else {}


def _seed_step(seed: int, step: int, process_index: int) -> None:
    """Make everything that a step draws a function of (seed, step, process)."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, process_index)).generate_state(1)[0]))

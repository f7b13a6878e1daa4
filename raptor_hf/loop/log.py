"""The log of a training: JSON lines, a tracker, a progress bar."""

import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from torch.optim.lr_scheduler import LRScheduler

from ..metrics import RSquared, compute_over_processes
from ..runs.processes import progress_bar
from .arguments import LoopArguments

_ON_THE_BAR = ("loss", "accuracy", "train/r2", "images_per_second")


class TrainingLog:
    """Writes the scalars of a training; a context manager.

    Args:
        first: updates before this process; lines of the log that come after them are dropped.
    """

    def __init__(self, accelerator: Accelerator, arguments: LoopArguments, first: int):
        self.accelerator, self.batch_size = accelerator, arguments.batch_size
        self.output_dir = Path(arguments.output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.started = time.perf_counter()
        self.restart_clock()

        # a run that goes on repeats the steps after its checkpoint: they are dropped
        accelerator.init_trackers(
            "logs" if arguments.report_to == "tensorboard" else "raptor_hf",  # a folder, a project
            config={name: str(value) for name, value in asdict(arguments).items()},
            init_kwargs={
                "tensorboard": {"purge_step": first + 1} if first else {},
                "wandb": {"dir": arguments.output_dir, "name": self.output_dir.name},
                "trackio": {"name": self.output_dir.name},
            },
        )
        if accelerator.is_main_process:
            self._drop_lines_after(first)
        options = {"unit": "step", "initial": first, "enabled": accelerator.is_main_process}
        self.bar = progress_bar(self.output_dir.name, arguments.steps, **options)

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        # `end_training` would also end the process group, which the caller still needs
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _drop_lines_after(self, first: int) -> None:
        """Keep the lines up to a step, without its validation, which a resumed run repeats."""
        path, kept = self.output_dir / "log.jsonl", []
        path.touch()
        for text in path.read_text(encoding="utf-8").splitlines():
            if not text.endswith("}"):  # the process was killed while it wrote this line
                continue
            line = json.loads(text)
            if line["step"] < first or (line["step"] == first and "learning_rate" in line):
                kept.append(text + "\n")
        path.write_text("".join(kept), encoding="utf-8")

    def end_step(self) -> None:
        """Count an update."""
        self.images += self.batch_size
        self.bar.update()

    def restart_clock(self) -> None:
        """Leave the time since the last line out of the training speed."""
        self.images, self.started_speed = 0, time.perf_counter()

    def write_step(
        self,
        step: int,
        scalars: dict[str, float],
        statistics: list[dict[str, dict]],
        schedule: LRScheduler,
    ) -> None:
        """Write the scalars of a step, R², the learning rate of the next step, images a second.

        Args:
            statistics: for every part of the batch, rows of `state_statistics` by chain.
        """
        speed = self.images / (time.perf_counter() - self.started_speed)
        self.restart_clock()
        more = {"learning_rate": schedule.get_last_lr()[0], "images_per_second": speed}
        self.write(step, {**scalars, **_r_squared(statistics), **more})

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append a line with the seconds since this process began."""
        self.accelerator.log(values, step=step)
        if not self.accelerator.is_main_process:
            return
        elapsed = round(time.perf_counter() - self.started, 2)
        with (self.output_dir / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "seconds": elapsed, **values}) + "\n")
        shown = {name: f"{values[name]:,.4g}" for name in _ON_THE_BAR if name in values}
        if shown:
            self.bar.set_postfix(shown, refresh=False)  # drawn with the next update


def read_log(output_dir: str | Path) -> list[dict[str, float]]:
    """Return the lines of a run's log."""
    lines = (Path(output_dir) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _r_squared(statistics: list[dict[str, dict]]) -> dict[str, float]:
    """Return R² of every chain on a batch, over all its tokens, and the mean over chains."""
    scores = {}
    for name in statistics[0]:
        rows = [part[name] for part in statistics]
        scores[f"train/{name}/r2"] = compute_over_processes(RSquared, rows)["mean"]["all"]
    if scores:
        scores["train/r2"] = float(np.mean(list(scores.values())))
    return scores

"""The log of a training: JSON lines, trackers, a progress bar, a picture of the curves."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas
from accelerate import Accelerator
from torch.optim.lr_scheduler import LRScheduler

from ..metrics import RSquared, compute_over_processes
from ..plotting import make_figure
from ..runs.processes import progress_bar
from .arguments import LoopArguments
from .setup import start_trackers

_ON_THE_BAR = ("loss", "accuracy", "train/r2", "images_per_second")


class TrainingLog:
    """Writes the scalars of a training; a context manager that draws the curves at its end.

    Args:
        first: updates before this process; lines of the log that come after them are dropped.
    """

    def __init__(self, accelerator: Accelerator, arguments: LoopArguments, first: int):
        self.accelerator, self.batch_size = accelerator, arguments.batch_size
        self.output_dir = Path(arguments.output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.started = self.speed_started = time.perf_counter()
        self.images = 0
        self.shown: dict[str, str] = {}
        start_trackers(accelerator, arguments, first)
        if accelerator.is_main_process:
            self._drop_lines_after(first)
        self.bar = progress_bar(
            self.output_dir.name,
            arguments.steps,
            initial=first,
            enabled=accelerator.is_main_process,
        )

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        # `end_training` would also end the process group, which the caller still needs
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.accelerator.is_main_process and (log := read_log(self.output_dir)):
            _plot_training(log, self.output_dir / "training.png")

    def _drop_lines_after(self, first: int) -> None:
        """Keep the lines up to a step, without its validation, which a resumed run repeats."""
        path, kept = self.output_dir / "log.jsonl", []
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
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

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave a time out of the training speed: validations and checkpoints."""
        started = time.perf_counter()
        yield
        self.speed_started += time.perf_counter() - started

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
        now = time.perf_counter()
        speed = self.images / (now - self.speed_started)
        self.images, self.speed_started = 0, now
        rate = schedule.get_last_lr()[0]
        values = {**scalars, **_r_squared(statistics)}
        self._write(step, {**values, "learning_rate": rate, "images_per_second": speed})

    def write_validation(self, step: int, scalars: dict[str, float]) -> None:
        """Write the scalars of a validation, and show the last two on the bar."""
        self._write(step, scalars, on_the_bar=list(scalars)[-2:])

    def _write(
        self, step: int, values: dict[str, float], on_the_bar: Sequence[str] = _ON_THE_BAR
    ) -> None:
        """Append a line with the seconds since this process began."""
        self.accelerator.log(values, step=step)
        if not self.accelerator.is_main_process:
            return
        elapsed = round(time.perf_counter() - self.started, 2)
        with (self.output_dir / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "seconds": elapsed, **values}) + "\n")
        self.shown |= {name: f"{values[name]:,.4g}" for name in on_the_bar if name in values}
        self.bar.set_postfix(self.shown, refresh=False)  # drawn with the next update


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


def _plot_training(log: list[dict[str, float]], path: Path) -> None:
    """Draw the curves of a training: errors on the left, scores on the right."""
    frame = pandas.DataFrame(log).set_index("step")
    watching = ["seconds", "learning_rate", "images_per_second"]
    frame = frame.drop(columns=watching, errors="ignore")
    is_score = frame.columns.str.endswith(("accuracy", "r2", "top5", "miou"))
    panels = [
        (frame.loc[:, ~is_score], "log", "loss"),
        (frame.loc[:, is_score], "linear", "score (1 is perfect)"),
    ]
    panels = [panel for panel in panels if len(panel[0].columns)]

    figure, axes = make_figure(
        1, len(panels), figsize=(6.4 * len(panels), 4), squeeze=False, layout="constrained"
    )
    for axis, (curves, scale, label) in zip(axes[0], panels, strict=True):
        for name, curve in curves.items():
            curve = curve.dropna()
            axis.plot(curve, ".-" if len(curve) < 20 else "-", lw=1, label=name)
        axis.set(xlabel="step", ylabel=label, yscale=scale)
        axis.legend(fontsize="x-small", ncols=1 + len(curves.columns) // 12)
    figure.savefig(path, dpi=110)

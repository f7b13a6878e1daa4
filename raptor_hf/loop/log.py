"""The log of a training: JSON lines, trackers, a progress bar, a picture of the curves.

The lines are whole also after a kill and a resume.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

from ..plotting import make_figure
from ..runs.processes import progress_bar

# what the bar shows of a training batch, and how it calls it
_ON_THE_BAR = {"loss": "loss", "accuracy": "accuracy", "train/r2": "R²"}
_ON_THE_BAR |= {"images_per_second": "images/s"}
_DRAW_EVERY = 60  # seconds between two pictures while it trains


class LossLog:
    """What is reported of a training; what came after the step it starts from is dropped.

    Args:
        first: updates that were made before.
        steps: updates at the end.
        batch_size: images an update.
        description: name on the progress bar.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        *,
        first: int,
        steps: int,
        batch_size: int,
        description: str,
    ):
        self.accelerator, self.path = accelerator, output_dir / "log.jsonl"
        self.picture, self.batch_size = output_dir / "training.png", batch_size
        self.started = self.resumed = self.drawn = time.perf_counter()
        self.images, self.seconds = 0, 0.0
        self.shown: dict[str, str] = {}
        enabled = accelerator.is_main_process
        if enabled:
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
            kept = [
                line for line in lines if line.endswith("}") and json.loads(line)["step"] <= first
            ]
            self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self.bar = progress_bar(description, steps, initial=first, enabled=enabled)

    def advance(self) -> None:
        """Count an update."""
        now = time.perf_counter()
        self.images += self.batch_size
        self.seconds += now - self.resumed
        self.resumed = now
        self.bar.update()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave a time out of the training speed: validation, checkpoints."""
        yield
        self.resumed = time.perf_counter()

    def images_per_second(self) -> float:
        """Return the training speed since this was last asked for."""
        speed = self.images / self.seconds if self.seconds else 0.0
        self.images, self.seconds = 0, 0.0
        return speed

    def write(self, step: int, values: dict[str, float], *, show: int = 0) -> None:
        """Append values, and the seconds since this process began.

        Args:
            show: so many of the last values go to the bar, besides those that always do.
        """
        self.accelerator.log(values, step=step)
        if not self.accelerator.is_main_process:
            return
        elapsed = round(time.perf_counter() - self.started, 2)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "seconds": elapsed, **values}) + "\n")
        names = {**_ON_THE_BAR, **{name: name for name in list(values)[len(values) - show :]}}
        texts = {names[n]: f"{value:,.4g}" for n, value in values.items() if n in names}
        self.shown |= texts
        self.bar.set_postfix(self.shown, refresh=False)  # drawn with the next update

    def draw(self, *, now: bool = True) -> None:
        """Draw the curves beside the checkpoints; with `now` off only once in a while."""
        late = time.perf_counter() - self.drawn > _DRAW_EVERY
        if self.accelerator.is_main_process and (now or late):
            _plot_training(read_log(self.path.parent), self.picture)
            self.drawn = time.perf_counter()

    def close(self) -> None:
        """End the bar and the trackers."""
        self.bar.close()
        # not end_training, which would leave no process group to what comes after
        self.accelerator.wait_for_everyone()
        for tracker in self.accelerator.trackers:
            tracker.finish()


def read_log(output_dir: str | Path) -> list[dict[str, float]]:
    """Return the lines of a run's log."""
    lines = (Path(output_dir) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _plot_training(log: list[dict[str, float]], path: str | Path) -> None:
    """Draw the curves of a training: errors on the left, qualities on the right.

    Args:
        log: lines of a run's log (`loss_log.read_log`).
    """
    watching = {"step", "seconds", "learning_rate", "images_per_second"}
    names = list(dict.fromkeys(name for line in log for name in line if name not in watching))
    qualities = [name for name in names if name.endswith(("accuracy", "r2", "top5", "miou"))]
    errors = [name for name in names if name not in qualities]
    panels = [(errors, "log", "loss"), (qualities, "linear", "score (1 is perfect)")]
    panels = [panel for panel in panels if panel[0]]
    figure, axes = make_figure(
        1, max(1, len(panels)), figsize=(6.4 * max(1, len(panels)), 4), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, (lines, scale, label) in zip(axes[0], panels, strict=False):
        for name in lines:
            points = [(line["step"], line[name]) for line in log if name in line]
            few = len(points) < 20
            axis.plot(*zip(*points, strict=True), ".-" if few else "-", lw=1, label=name)
        axis.set(xlabel="step", ylabel=label, yscale=scale)
        axis.legend(fontsize="x-small", ncols=1 + len(lines) // 12)
    figure.savefig(path, dpi=110)

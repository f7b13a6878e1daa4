"""The log of a training: one JSON line a report, whole also after a kill and a resume."""

import json
import time
from pathlib import Path

import torch
from accelerate import Accelerator


class LossLog:
    """A log of JSON lines, and the trackers; what came after the step it starts from is dropped."""

    def __init__(self, accelerator: Accelerator, path: Path, first: int):
        self.accelerator, self.path, self.started = accelerator, path, time.time()
        if accelerator.is_main_process:
            lines = path.read_text().splitlines() if path.exists() else []
            kept = [
                line for line in lines if line.endswith("}") and json.loads(line)["step"] <= first
            ]
            path.write_text("".join(line + "\n" for line in kept))

    def mean(self, scalars: dict[str, torch.Tensor]) -> dict[str, float]:
        """Scalars of this step as their means over the processes."""
        means = self.accelerator.reduce(
            torch.stack([value.detach().float() for value in scalars.values()]), "mean"
        )
        return dict(zip(scalars, means.tolist(), strict=True))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append values, and the seconds since this process began."""
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            line = {"step": step, "seconds": round(time.time() - self.started, 2), **values}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def read_log(output_dir: str | Path) -> list[dict[str, float]]:
    """The lines of a run's log."""
    lines = (Path(output_dir) / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]

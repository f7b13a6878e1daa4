"""What a program does until it does what it is for, in seconds: `--timings`."""

import time

import psutil

_MARKS: list[tuple[str, float]] = []


def mark(what: str) -> None:
    """Note that something has been done by now."""
    _MARKS.append((what, time.time()))


def startup_times() -> str:
    """Return what was noted, a line each with the seconds that it took, and their sum."""
    before = started = psutil.Process().create_time()
    lines = ["until the first step:"]
    for what, moment in [*_MARKS, ("in all", None)]:
        seconds = before - started if moment is None else moment - before
        lines.append(f"  {what:<28} {seconds:6.2f} s")
        before = moment
    return "\n".join(lines)

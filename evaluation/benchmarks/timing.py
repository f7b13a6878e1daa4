"""Fair comparisons on a busy machine: interleaved times, ratios, the peak of matrix products."""

import statistics
import time
from collections.abc import Callable, Iterator

import torch

Row = tuple[str, dict[str, float]]  # title of a measurement, and a figure for each candidate


def interleaved(
    candidates: dict[str, Callable[[], object]], *, rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return the times of several candidates in seconds, a list for each.

    Every round visits all candidates forwards and then backwards, so that other load on the machine
    hits all of them alike. One more round at the start warms up and is not counted.

    Args:
        clock: wall time, or `time.process_time` for CPU time.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for visit in range(-2, 2 * rounds):
        names = list(candidates) if visit % 2 == 0 else list(reversed(candidates))
        for name in names:
            start = clock()
            candidates[name]()
            if visit >= 0:
                times[name].append(clock() - start)
    return times


def median_ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    """Return the median over the visits of the time of `slow` over the time of `fast`."""
    pairs = zip(times[slow], times[fast], strict=True)
    return statistics.median(a / b for a, b in pairs)


def clock_of(device: str) -> Callable[[], float]:
    """Return a clock in seconds: CPU time of all threads, or the time of a GPU's work."""
    if device != "cuda":
        return time.process_time
    start = torch.cuda.Event(enable_timing=True)
    start.record()

    def clock() -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return start.elapsed_time(event) / 1000

    return clock


def matmul_peak(device: str, dtype: torch.dtype, rounds: int) -> float:
    """Return the best FLOP a second of products of large square matrices."""
    size = 8192 if device == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = interleaved(
        {"product": lambda: left @ right}, rounds=4 * rounds, clock=clock_of(device)
    )
    return 2 * size**3 / min(times["product"])


def speed_rows(
    title: str, times: dict[str, list[float]], flops: dict[str, int], batch: int, peak: float
) -> Iterator[Row]:
    """Yield speeds as multiples of the reference, images a second, and shares of the peak.

    Args:
        flops: of an image, for the first word of every candidate's name.
        batch: images in a call.
        peak: FLOP a second that the device can do.
    """
    others = [name for name in times if name != "reference"]
    yield title, {name: median_ratio(times, "reference", name) for name in others}
    speeds, shares = {}, {}
    for name, seconds in times.items():
        speeds[name] = batch / statistics.median(seconds)
        shares[name] = flops[name.split()[0].rstrip(",")] * speeds[name] / peak
    yield f"{title}: images a second", speeds
    yield f"{title}: share of the peak", shares

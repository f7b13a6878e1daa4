"""Comparing fairly on a machine that does other things too: interleaved times, peak memory."""

import ctypes
import multiprocessing
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import torch

_M_MMAP_THRESHOLD = -3  # of malloc.h
# a clean process that has imported everything, and forks in a moment
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["raptor_hf.activations.writing"])


def interleaved(
    candidates: dict[str, Callable[[int], object]],
    *,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return times of several ways to do the same, in seconds, a list a candidate.

    Every round visits them forwards and then backwards, so that whatever else the machine does
    hits all alike; `median_ratio` compares them. A first round that is not counted warms up.

    Args:
        candidates: each is called with the number of the visit, to choose the same work.
        clock: wall time, or `time.process_time`: what all threads computed, also on a busy machine.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for visit in range(-2, 2 * rounds):
        names = list(candidates) if visit % 2 == 0 else list(reversed(candidates))
        for name in names:
            start = clock()
            candidates[name](visit % (2 * rounds))
            if visit >= 0:
                times[name].append(clock() - start)
    return times


def median_ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    """Return how many times longer `slow` takes than `fast`: the median over the visits, side by
    side.
    """
    pairs = zip(times[slow], times[fast], strict=True)
    return statistics.median(a / b for a, b in pairs)


def clock_of(device: str) -> Callable[[], float]:
    """Return CPU time of all threads, or when a GPU had done all that it was given; in seconds."""
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
    """Return FLOP a second in products of large square matrices: the best of some."""
    size = 8192 if device == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    products = {"product": lambda _visit: left @ right}
    times = interleaved(products, rounds=4 * rounds, clock=clock_of(device))
    return 2 * size**3 / min(times["product"])


def within(seconds: float, title: str, rows: Callable[[], Iterator]) -> Iterator:
    """Yield rows of a measurement, unless they take longer than so many seconds: then say so."""

    def too_long(_signal, _frame) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        measured = list(rows())
    except TimeoutError:
        measured = [(f"{title}: left out", {"after seconds": seconds})]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    yield from measured


def peak_memory(work: Callable, *arguments) -> int:
    """Return the bytes that a new process has for itself at most; mapped files do not count.

    Args:
        work: a function of a module, which a new process can find.

    Raises:
        RuntimeError: the process failed.
    """
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=watched, args=(sender, work, *arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"{work.__name__} failed: see above.") from None
    finally:
        process.join()


def watched(sender, work: Callable, *arguments) -> None:
    """Work in the new process of `peak_memory`, and watch its own memory meanwhile."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while True:
            memory = psutil.Process().memory_info()
            peak = max(peak, memory.rss - memory.shared)
            if done.wait(0.002):
                return

    torch.set_num_threads(1)
    _return_freed_memory()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    work(*arguments)
    done.set()
    watcher.join()
    sender.send(peak)


def _return_freed_memory() -> None:
    """Let glibc give back freed blocks at once: how many it keeps changes from run to run."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 2**16)

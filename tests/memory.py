"""New processes of clean memory, and the peak of what a process has for itself."""

import ctypes
import multiprocessing
import threading

import psutil
import torch

_M_MMAP_THRESHOLD = -3  # of malloc.h
# a process that has imported everything, and forks in a moment
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["raptor_hf.activations.writing"])


def peak_memory(work, *arguments):
    """The bytes that a new process has for itself at most while it calls a function of a module.

    Mapped files do not count.
    """
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_watch, args=(sender, work, *arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()  # an EOFError where it failed
    finally:
        process.join()


def _watch(sender, work, *arguments):
    """Call the function, and send the largest memory seen meanwhile."""
    peak, done = 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.002):
            memory = psutil.Process().memory_info()
            peak = max(peak, memory.rss - memory.shared)

    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc shall give freed blocks back at once
        libc.mallopt(_M_MMAP_THRESHOLD, 2**16)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    work(*arguments)
    done.set()
    watcher.join()
    sender.send(peak)

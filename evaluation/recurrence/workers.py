"""Many small runs of one program: several processes at once, and a record of what is done."""

import contextlib
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def in_processes(
    work: Callable[..., Result], tasks: dict[Task, tuple], processes: int
) -> Iterator[tuple[Task, Result]]:
    """Yield every task with what `work` makes of its arguments, as they are finished.

    A stop, or an error of one of them, ends all processes at once; so does the end of this one.

    Args:
        tasks: arguments by task; they go to new Python processes.
        processes: at the same time.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with_the_parent)
    try:
        futures = {pool.submit(work, *arguments): task for task, arguments in tasks.items()}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    pool.shutdown()


def _end_with_the_parent() -> None:
    """Let this process end when the one that started it does, even by `kill -9`."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Let nothing be printed."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield


def read_record(path: str | Path) -> list[dict]:
    """Return the entries of a record, a line each; none where there is no file.

    A last line that a kill cut off is none.
    """
    path = Path(path)
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1]]


def mend_record(path: str | Path) -> None:
    """Take a line that a kill cut off out of a record: the next one would be added to it."""
    path = Path(path)
    if path.exists():
        whole = path.with_name(path.name + ".tmp")
        write_entries(whole, read_record(path), mode="w")
        os.replace(whole, path)


def write_entries(path: str | Path, entries: Sequence[dict], *, mode: str = "a") -> None:
    """Add entries to a record, or (`mode="w"`) write one."""
    with open(path, mode, encoding="utf-8") as file:
        file.write("".join(json.dumps(entry) + "\n" for entry in entries))

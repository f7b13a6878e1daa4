"""How a program runs: on which processes, and how it stops when it is told to."""

import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import TorchDynamoPlugin, parse_flag_from_env
from safetensors import SafetensorError
from tqdm.auto import tqdm

# sent by Ctrl-C, schedulers, `#SBATCH --signal=USR1@…`, submitit and a closed terminal; Windows
# lacks the last three
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")
STOP_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


class Interrupted(Exception):
    """A run that stopped because a signal asked for it; `saved` says what is kept."""

    def __init__(self, signal_number: int, saved: str):
        self.signal_number = signal_number
        super().__init__(f"Stopped by {signal.Signals(signal_number).name}. {saved}")


@contextmanager
def noted_stop_signals() -> Iterator[list[int]]:
    """Only note signals that ask to stop, in a list: launchers and schedulers may send several.

    SIGKILL always works. Outside of Python's main thread, where no signal arrives, the list stays
    empty.
    """
    received: list[int] = []
    previous = _handle_stop_signals(lambda number, _frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _handle_stop_signals(handler: Callable) -> dict[int, Callable]:
    """Set the handler of all stop signals; return the handlers that were set before."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = set(STOP_SIGNALS)
    hangup = getattr(signal, "SIGHUP", None)
    if hangup and signal.getsignal(hangup) is signal.SIG_IGN:  # started by nohup: let it go on
        numbers.remove(hangup)
    return {number: signal.signal(number, handler) for number in numbers}


def ignore_stop_signals() -> None:
    """Ignore stop signals in a DataLoader worker: the process that reads from it decides."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def process_state() -> PartialState:
    """Return which of how many processes this is, as `accelerate launch` or `torchrun` set up.

    Accelerate sees several processes on the CPU only if it is told of the CPU. The timeout is long:
    one process may well wait for hours until another has written its last shard.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=timedelta(days=1))


def compiled(function: Callable) -> Callable:
    """Return a function compiled as `accelerate launch --dynamo_backend` asks; itself without that.

    Compile what is small and serves many calls, as a block all its applications.
    """
    plugin = TorchDynamoPlugin()  # as the launcher's environment says
    backend = plugin.backend.value.lower()
    if backend == "no":
        return function
    return torch.compile(function, **{**plugin.to_kwargs(), "backend": backend})


def run_program(main: Callable[[], None], *, alone: bool = False) -> None:
    """Run a program's `main` under any launcher; say on how many processes, and how to go on.

    A stop signal ends it with the exit code 128 + its number, as shells expect; an error that its
    user can mend with one line and the exit code 2. A bug keeps its traceback.

    Args:
        alone: refuse several processes, for work that they would not share.
    """
    for stream in (sys.stdout, sys.stderr):  # printing a letter that a terminal lacks ends nothing
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    # like `8 processes on cuda, bf16`
    state = process_state()
    number, precision = state.num_processes, os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    text = "1 process" if number == 1 else f"{number} processes"
    text += f" on {state.device.type}"
    if precision != "no":
        text += f", {precision}"
    state.print(text, file=sys.stderr, flush=True)

    # a stop signal ends the program where it is
    main_process, raised = os.getpid(), []

    def stop(number: int, _frame) -> None:
        if os.getpid() == main_process:  # not one that it forked, like a DataLoader's worker
            raised.append(Interrupted(number, "What was finished is kept."))
            raise raised[-1]

    _handle_stop_signals(stop)
    try:
        if alone and state.num_processes > 1:
            raise ValueError(f"{sys.argv[0]} works on one process; {number} were started.")
        main()
    except BaseException as error:
        # raised in a function that a library calls back, such as Arrow, it becomes another error
        interruption = next(iter(raised), error)
        if isinstance(interruption, Interrupted):
            ignore_stop_signals()
            how = "" if alone else _how_to_resume()
            state.print(f"\n{interruption} {how}", file=sys.stderr, flush=True)
            sys.exit(128 + interruption.signal_number)
        message = _message_for_user(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)
    state.wait_for_everyone()
    state.destroy_process_group()


def _message_for_user(error: BaseException) -> str | None:
    """Return the message of an error that its user can mend; None of a bug.

    These are errors of files and the Hub, NaN, and what our own code raises.
    """
    message = str(error)
    frame, _ = list(traceback.walk_tb(error.__traceback__))[-1]
    ours = frame.f_globals["__name__"].partition(".")[0] in ("raptor_hf", "evaluation", "__main__")
    statement = traceback.extract_tb(error.__traceback__)[-1].line

    # of a worker of a DataLoader: torch raises it again, with the worker's traceback as its message
    if "in DataLoader worker process" in message:
        last = message.rpartition("Traceback (most recent call last):")[2]
        frames, message = re.split(r"\n(?=\S)", last, maxsplit=1)
        message = message.partition(": ")[2].strip()
        where, statement = frames.rpartition("  File ")[2].split("\n")[:2]
        ours, statement = re.search(r"raptor_hf/[\w/]+\.py", where), statement.strip()
    elif message.startswith("DataLoader worker"):  # it ended, and has said why
        return message
    if isinstance(error, OSError | FloatingPointError | SafetensorError):
        return message
    if isinstance(error, ValueError) and ours and statement.startswith("raise "):
        return message
    return None


def _how_to_resume() -> str:
    """Return the command that resumes this run, as far as a process knows how it started."""
    launched = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & set(os.environ)
    start = "…" if launched else "python"  # accelerate launch or torchrun, and their options
    words = [word for word in sys.argv if word != "--resume"]
    return f"Resume with: {start} {shlex.join([*words, '--resume'])}"


def progress_bar(description: str | None, total: int, *, enabled: bool = True, **options) -> tqdm:
    """Return a progress bar of tqdm that draws often on a terminal and rarely into a log file."""
    seconds = 0.2 if sys.stderr.isatty() else 20
    options = {"mininterval": seconds, "dynamic_ncols": True, **options}
    return tqdm(total=total, desc=description, disable=not enabled, **options)

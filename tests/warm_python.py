"""A Python that has imported everything, and runs programs in forks of itself.

Most of the time of a small program is the import of torch and transformers. `serve` imports them
once; `request` stands in the place of `python` (tests/programs.py writes an executable that calls
it), hands on its arguments, folder, environment, pipes and signals, and ends as the program ends.
So Bash scripts and launchers start programs like this too. The server never computes anything: a
fork has no thread and no drawn random number that a new process would not have.

What is read while modules are imported can't be changed afterwards. `request` starts a new Python
where one of these variables differs from the server's, or where it is asked for more than a script,
a module or a command.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import sys
import threading
import traceback
import types

READ_AT_IMPORT = ("HF_", "MALLOC_", "OMP_", "PYTHON", "TORCH_LOGS", "TRANSFORMERS_")
# gradio is left to the few programs that want it; matplotlib.pyplot chooses a backend when asked
PRELOADED = (
    "accelerate", "accelerate.commands.launch", "datasets", "evaluate", "huggingface_hub",
    "jinja2", "matplotlib.figure", "numpy", "pyarrow.parquet", "scipy.stats", "sklearn.datasets",
    "tensorboard", "torch.distributed.run", "torch.utils.tensorboard", "transformers",
    "transformers.models.bit.image_processing_bit",
    "transformers.models.dinov2.modeling_dinov2",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers",
)  # fmt: skip
LAUNCHERS = ("accelerate.commands.launch", "accelerate.commands.accelerate_cli")
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def read_at_import(environment) -> dict:
    """Return the variables that a running process can't change any more."""
    return {k: v for k, v in environment.items() if k.startswith(READ_AT_IMPORT)}


def request() -> None:
    """Run the program of `sys.argv` in a fork of the server and exit as it exits."""
    argv, python = sys.argv[1:], os.environ["WARM_PYTHON_REAL"]
    if argv[:1] == ["-u"]:  # torchrun's workers write without a buffer
        argv = argv[1:]
    known = argv and (argv[0] in ("-m", "-c") or not argv[0].startswith("-"))
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ["WARM_PYTHON_SOCKET"])
    server = json.loads(receive(connection))
    if not known or read_at_import(os.environ) != server:
        os.execv(python, [python, *sys.argv[1:]])
    message = {"argv": argv, "cwd": os.getcwd(), "environment": dict(os.environ)}
    message["executable"] = os.path.abspath(sys.argv[0])
    socket.send_fds(connection, [b"!"], [0, 1, 2])
    for number in FORWARDED:
        signal.signal(number, lambda number, _frame: connection.sendall(bytes([number])))
    send(connection, message)
    code = json.loads(receive(connection))
    if code < 0:  # ended by a signal: end by the same
        if -code in FORWARDED:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def send(connection: socket.socket, content) -> None:
    """Send a JSON value, its length first."""
    data = json.dumps(content).encode()
    connection.sendall(len(data).to_bytes(8, "big") + data)


def receive(connection: socket.socket) -> bytes:
    """Receive what `send` sent; an EOFError where the other side has gone."""
    data, length = b"", None
    while length is None or len(data) < length:
        part = connection.recv(8 if length is None else length - len(data))
        if not part:
            raise EOFError("The warm Python has gone.")
        data += part
        if length is None and len(data) == 8:
            data, length = b"", int.from_bytes(data, "big")
    return data


class Server:
    """The programs that run, by the file descriptors that tell of them."""

    def __init__(self, path: str):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(64)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ, self.accept)
        # the tests hold the other end: nothing outlives them
        self.selector.register(0, selectors.EVENT_READ, self.stop)

    def serve(self) -> None:
        """Answer until the tests end."""
        while True:
            for key, _ in self.selector.select():
                if key.fd in self.selector.get_map():  # not finished by an event before this one
                    key.data()

    def stop(self) -> None:
        """Kill what still runs, and exit."""
        for key in list(self.selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket) and key.fileobj is not self.listener:
                key.data(abandon=True)
        os._exit(0)

    def accept(self) -> None:
        """Fork for a program."""
        connection, _ = self.listener.accept()
        try:
            send(connection, read_at_import(os.environ))
            _, files, _, _ = socket.recv_fds(connection, 1, 3)
            message = json.loads(receive(connection)) if files else None
        except (ConnectionError, EOFError):
            message = None
        if message is None:  # the client chose a new Python
            connection.close()
            return
        pid = os.fork()
        if pid == 0:
            self.forget()
            os.close(connection.detach())
            become(message, files)
        for file in files:
            os.close(file)
        ended = os.pidfd_open(pid)

        def finish() -> None:
            _, status = os.waitpid(pid, 0)
            with contextlib.suppress(BrokenPipeError):  # the client was killed
                send(connection, os.waitstatus_to_exitcode(status))
            for file in (ended, connection):
                self.selector.unregister(file)
            os.close(ended)
            connection.close()

        def pass_on(abandon: bool = False) -> None:
            numbers = b"" if abandon else connection.recv(16)
            for number in numbers:
                os.kill(pid, number)
            if not numbers:  # whoever waited for it was killed, and so is the program
                os.killpg(pid, signal.SIGKILL)
                finish()

        self.selector.register(ended, selectors.EVENT_READ, finish)
        self.selector.register(connection, selectors.EVENT_READ, pass_on)

    def forget(self) -> None:
        """Close in a fork what belongs to the server."""
        for key in list(self.selector.get_map().values()):
            if key.fd != 0:
                os.close(key.fd)
        self.selector.close()


def become(message: dict, files: list[int]) -> None:
    """Turn this fork into the program that was asked for; never returns."""
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    # the server's own were made for other files, which may be sought in
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
    os.chdir(message["cwd"])
    os.environ.clear()
    os.environ.update(message["environment"])
    for number in (*FORWARDED, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    try:
        run_program(message["argv"], message["executable"])
        code = 0
    except SystemExit as exit_:
        code = exit_.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 128 + signal.SIGINT
    except BaseException:  # as the interpreter itself does
        sys.excepthook(*sys.exc_info())
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def run_program(argv: list[str], executable: str) -> None:
    """Run `script …`, `-m module …` or `-c command …` as the interpreter does."""
    kind = argv[0]
    if kind == "-c":
        sys.argv, sys.path[0] = ["-c", *argv[2:]], ""
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(argv[1], "<string>", "exec"), main.__dict__)
    elif kind == "-m":
        sys.argv, sys.path[0] = argv[1:], os.getcwd()
        if argv[1] in LAUNCHERS:  # what they start is started like this too
            sys.executable = executable
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = argv, os.path.dirname(os.path.abspath(kind))
        # not run_path, which puts the old modules back before threads and exit functions run
        main = types.ModuleType("__main__")
        main.__file__, main.__builtins__ = kind, __builtins__
        sys.modules["__main__"] = main
        with open(kind, "rb") as file:
            exec(compile(file.read(), kind, "exec"), main.__dict__)


def preload() -> None:
    """Import the libraries, and every module of the package."""
    for name in PRELOADED:
        importlib.import_module(name)
    import raptor_hf

    for module in pkgutil.walk_packages(raptor_hf.__path__, "raptor_hf."):
        if not module.name.endswith("__main__") and "demo" not in module.name:
            importlib.import_module(module.name)


if __name__ == "__main__":
    preload()
    if threading.active_count() > 1:
        raise RuntimeError(f"A fork would lose these threads: {threading.enumerate()}.")
    gc.collect()
    gc.freeze()  # the forks share these pages
    server = Server(sys.argv[1])
    print("ready", flush=True)
    server.serve()

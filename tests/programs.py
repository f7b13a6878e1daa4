"""How tests run the project's programs: as a user does, offline, from the repository's root.

A new Python spends six seconds on imports. So `run` forks the process of the tests, which has
imported everything already, and makes the fork a program with its own arguments, environment, files
and exit code. `start`, and `run` with `new_process=True`, start a new Python.
"""

import logging
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from multiprocessing import connection
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATHS = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATHS, "HF_HUB_OFFLINE": "1"}
# what Bash scripts find as python, accelerate and torchrun
ENVIRONMENT["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TWO_PROCESSES = [*TORCHRUN, "--standalone", "--nproc_per_node", "2"]
ACCELERATE_LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
# variables that are read while modules are imported: a fork is too late for them
READ_AT_IMPORT = ("HF_", "LC_", "MALLOC_", "PYTHON", "TORCH_LOGS", "TRANSFORMERS_")
SECONDS = 600  # that a program may take

# the head of a program that stands for a machine on which this package is not installed
WITHOUT_THE_PACKAGE = """
import sys

class Hidden:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "raptor_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden)  # before the finders that would find it
try:
    import raptor_hf
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("this package can be imported")
"""

# Bash functions: a script hands each of its Python programs to `_run_script`, and waits for it
ASK = (
    '() { { printf "%s\\0" $# "$@"; env -0; } > "$TESTS_FOLDER/request"; echo >&$TESTS_ASK; '
    'local code; read -r code <&$TESTS_ANSWER; cat "$TESTS_FOLDER/stdout"; '
    'cat "$TESTS_FOLDER/stderr" >&2; return $code; }'
)
FUNCTIONS = {
    "BASH_FUNC_ask%%": ASK,
    "BASH_FUNC_python%%": '() { ask "$@"; }',
    "BASH_FUNC_accelerate%%": '() { ask -m accelerate.commands.launch "${@:2}"; }',
    "BASH_FUNC_torchrun%%": '() { ask -m torch.distributed.run "$@"; }',
}


def start(*command, **variables):
    """A program that is running, a new process in a session of its own."""
    return subprocess.Popen(
        [*map(str, command)], cwd=ROOT, env={**ENVIRONMENT, **variables}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def run(*command, check=True, new_process=False, **variables):
    """A finished program as a `CompletedProcess`; with `check` it must have succeeded.

    Args:
        new_process: start a new Python instead of a fork; so do variables that imports read. A
            program that compiles needs it: inductor's workers do not survive a fork.
    """
    command = [*map(str, command)]
    read_at_import = any(name.startswith(READ_AT_IMPORT) for name in variables)
    can_fork = command[0] in (sys.executable, "bash") and not new_process and not read_at_import
    if can_fork:
        with tempfile.TemporaryDirectory() as folder:
            run_fork = _run_script if command[0] == "bash" else _run_python
            done = run_fork(command, {**ENVIRONMENT, **variables}, Path(folder))
    else:
        process = start(*command, **variables)
        try:
            output = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        done = subprocess.CompletedProcess(command, process.returncode, *output)
    message = f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    assert not check or done.returncode == 0, message
    return done


def _run_script(command, environment, folder):
    """Run a Bash script whose Python programs are forks of the tests."""
    asked, ask = os.pipe()
    answer, answered = os.pipe()
    own = {"TESTS_FOLDER": str(folder), "TESTS_ASK": str(ask), "TESTS_ANSWER": str(answer)}
    with open(folder / "script_out", "w+") as out, open(folder / "script_err", "w+") as err:
        script = subprocess.Popen(
            command, cwd=ROOT, env=environment | own | FUNCTIONS, pass_fds=(ask, answer),
            stdout=out, stderr=err,
        )  # fmt: skip
        os.close(ask)
        os.close(answer)
        # a line for every program; the last copy of `ask` is closed as the script ends
        with open(asked) as requests:
            for _ in requests:
                number, *words = (folder / "request").read_text().split("\0")[:-1]
                variables = dict(word.split("=", 1) for word in words[int(number) :])
                program = [sys.executable, *words[: int(number)]]
                code = _run_python(program, variables, folder).returncode
                os.write(answered, f"{code if code >= 0 else 128 - code}\n".encode())
        os.close(answered)
        code = script.wait()
    printed = [(folder / name).read_text() for name in ("script_out", "script_err")]
    return subprocess.CompletedProcess(command, code, *printed)


def _run_python(command, environment, folder):
    """Run `python PROGRAM …`, or a launcher's programs, in forks of this process."""
    environments = [environment]
    if command[: len(TWO_PROCESSES)] == TWO_PROCESSES:
        words, port = command[len(TWO_PROCESSES) :], str(free_port())
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}  # fmt: skip
        ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
        environments = [environment | shared | rank for rank in ranks]
    elif command[: len(ACCELERATE_LAUNCH)] == ACCELERATE_LAUNCH:
        words, launched = _accelerate(command[len(ACCELERATE_LAUNCH) :])
        environments = [environment | launched]
    else:
        words = command[1:]
    with open(folder / "stdout", "w+") as stdout, open(folder / "stderr", "w+") as stderr:
        context = multiprocessing.get_context("fork")
        processes = [
            context.Process(target=_become, args=(words, variables, stdout, stderr))
            for variables in environments
        ]
        for process in processes:
            process.start()
        code = _wait(processes)
    printed = [(folder / name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(command, code, *printed)


def _accelerate(words):
    """The words of the program that `accelerate launch WORDS` starts, and the variables it sets."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    command, environment = prepare_simple_launcher_cmd_env(arguments)
    changed = {name: environment[name] for name in environment.keys() - os.environ.keys()}
    return command[1:], changed


def _become(words, environment, stdout, stderr):
    """Turn this fork into `python WORDS…`."""
    from accelerate.state import AcceleratorState, GradientState

    # its own files, folder, variables and signals
    os.dup2(stdout.fileno(), 1)
    os.dup2(stderr.fileno(), 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(environment.get("PWD", ROOT) if "TESTS_FOLDER" in environment else ROOT)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    # what the tests' own models and loggers left behind
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    logging.getLogger().handlers.clear()
    warnings.showwarning = _print_warning
    # as the interpreter runs `-c CODE`, `-m MODULE` and a file
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
        runpy.run_path(words[0], run_name="__main__")


def _print_warning(message, category, filename, lineno, file=None, line=None):
    """Print a warning, which pytest would only note."""
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def _wait(processes):
    """The exit code of processes that belong together: the first that fails ends the others."""
    code, running = 0, {process.sentinel: process for process in processes}
    while running:
        ended = connection.wait(running, timeout=SECONDS)
        for sentinel in ended:
            process = running.pop(sentinel)
            process.join()
            code = code or process.exitcode
        if code or not ended:
            for process in running.values():
                process.kill()
        if not ended:
            raise TimeoutError(f"killed after {SECONDS} seconds")
    return code


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]

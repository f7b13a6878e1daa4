"""How tests run the project's programs: as a user does, offline, from the repository's root."""

import atexit
import functools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATHS = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATHS, "HF_HUB_OFFLINE": "1"}
# what Bash scripts find as python, accelerate and torchrun
ENVIRONMENT["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TWO_PROCESSES = [*TORCHRUN, "--standalone", "--nproc_per_node", "2"]
ACCELERATE_LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]

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


@functools.cache
def warm_python():
    """The environment of programs that are forked from a Python which has imported everything.

    In it `python`, `accelerate` and `torchrun` of Bash scripts, and the workers of launchers, are
    forks too; see `warm_python.py`. None where the operating system can't do it.
    """
    if not hasattr(os, "pidfd_open"):
        return None
    folder = Path(tempfile.mkdtemp(prefix="raptor_hf_python_"))
    python = folder / "python"
    python.write_text(
        f"#!{sys.executable} -SE\nimport sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import warm_python\nwarm_python.request()\n"
    )
    python.chmod(0o755)
    environment = {
        **ENVIRONMENT,
        "WARM_PYTHON": str(python),
        "WARM_PYTHON_REAL": sys.executable,
        "WARM_PYTHON_SOCKET": str(folder / "socket"),
        "PYTHON_EXEC": str(python),  # what torchrun starts its workers with
        "BASH_FUNC_python%%": '() { "$WARM_PYTHON" "$@"; }',
        "BASH_FUNC_accelerate%%": '() { python -m accelerate.commands.accelerate_cli "$@"; }',
        "BASH_FUNC_torchrun%%": '() { python -m torch.distributed.run "$@"; }',
    }
    server = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "warm_python.py", folder / "socket"],
        env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    atexit.register(shutil.rmtree, folder)
    atexit.register(server.communicate)  # closes its input, and so ends it
    assert server.stdout.readline() == "ready\n"
    return environment


def start(*command, new_process=False, **variables):
    """A program that is running, in a session of its own.

    Args:
        new_process: start a new Python, and do not fork a warm one: for what is read while modules
            are imported, and where a process is killed.
    """
    environment = None if new_process else warm_python()
    if environment and command[0] == sys.executable:
        command = (environment["WARM_PYTHON"], *command[1:])
    return subprocess.Popen(
        [*map(str, command)], cwd=ROOT, env={**(environment or ENVIRONMENT), **variables},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def run(*command, check=True, new_process=False, **variables):
    """A finished program as a `CompletedProcess`; with `check` it must have succeeded.

    Args:
        new_process: as for `start`.
    """
    process = start(*command, new_process=new_process, **variables)
    try:
        stdout, stderr = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert not check or process.returncode == 0, stdout + stderr
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]

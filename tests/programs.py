"""How tests run the project's programs: as a user does, offline, from the repository's root."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
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


def start(*command, **variables):
    """A process that is running, in a session of its own."""
    return subprocess.Popen(
        [*map(str, command)], cwd=ROOT, env={**ENVIRONMENT, **variables}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def run(*command, check=True, **variables):
    """A finished process with what it printed; with `check` it must have succeeded."""
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, env={**ENVIRONMENT, **variables}, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]

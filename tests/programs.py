"""How tests run the project's programs: as a user does, offline, from the repository's root."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def run(*command, check=True, **variables):
    """A finished process with what it printed; with `check` it must have succeeded."""
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, env={**ENVIRONMENT, **variables}, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done

"""`reproduce.sh study --quick`, from the digits line to the report; cut off, and gone on with."""

import json
import sys

import pytest

from raptor_hf.runs.folder import mark_run
from tests.programs import run

QUICK = ("bash", "training/reproduce.sh", "study", "--quick")


@pytest.fixture(scope="module")
def quick(line, tmp_path_factory):
    """The folder of a quick study, and what it needs to be run again."""
    out = tmp_path_factory.mktemp("study")
    variables = {"OUT": str(out), "DIGITS": str(line[0]), "RECIPES": "tests/recipes"}
    printed = run(*QUICK, **variables).stdout
    assert "report: " in printed and "| claim | digits |" in printed
    return out / "results", variables


def test_what_a_study_writes(quick):
    results, _ = quick
    read = {path.stem: json.loads(path.read_text()) for path in results.glob("*.json")}
    assert {"maps", "gap", "partitions", "training", "run"} == set(read)
    assert read["run"]["finished"]
    maps = read["maps"]["maps"]
    assert set(maps) == {"teacher", "untrained", "drop_0.2", "over_0_4", "over_0_16"}
    assert maps["drop_0.2"]["drop_path_rate"] == 0.2
    assert 0.99 < maps["untrained"]["floor"]["R²"] < 1  # it hardly moves
    rows = read["gap"]["rows"]
    assert [(row["k"], row["seed"]) for row in rows] == [(1, 0), (3, 0)]
    for row in rows:
        assert len(row["to_spread"]) == 12
    assert (results / "partitions.png").read_bytes()[:4] == b"\x89PNG"


def test_a_study_goes_on(quick):
    results, variables = quick
    before = {path.name: path.read_bytes() for path in results.rglob("*.*")}
    assert "finished already" in run(*QUICK, **variables).stdout
    mark_run(results, finished=False)
    students = sorted((results / "students").iterdir())
    students[0].unlink()  # killed while it was trained
    others = [path.stat().st_mtime_ns for path in students[1:]]
    (results / "gap.json").unlink()
    run(*QUICK, **variables)
    assert [path.stat().st_mtime_ns for path in students[1:]] == others
    after = {path.name: path.read_bytes() for path in results.rglob("*.*")}
    assert {n for n in before if before[n] != after[n]} <= {"run.json"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--experiments", "gaps"], "--experiments are gap, partitions"),
        (["--teachers", "teacher=here"], "taken"),
        (["--dry_run"], "no --dry_run"),
    ],
)
def test_wrong_arguments(flags, words, tmp_path):
    command = ["-m", "evaluation.recurrence.study", "--teacher", "t", "--activations", "online"]
    failed = run(sys.executable, *command, "--output_dir", tmp_path / "out", *flags, check=False)
    assert failed.returncode != 0 and words in failed.stderr

"""Recipes and flags, and output folders that say which run made them."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from raptor_hf.loop.arguments import LoopArguments
from raptor_hf.runs.arguments import named_folders, parse_arguments
from raptor_hf.runs.files import (
    files_fingerprint,
    folder_digest,
    read_json,
    rounded,
    write_json,
)
from raptor_hf.runs.folder import finish_run, start_run
from tests.helpers import build_arguments


@dataclasses.dataclass
class Arguments:
    teacher: str
    spans: list[str] = dataclasses.field(default_factory=list)


def arguments(path, **changes):
    values = {"teacher": "t", "output_dir": str(path)} | changes
    return build_arguments(values, Arguments, LoopArguments)


def test_a_finished_run_is_skipped_and_says_so(tmp_path, capsys):
    assert start_run(*arguments(tmp_path / "run")) is False
    finish_run(tmp_path / "run")
    assert start_run(*arguments(tmp_path / "run", resume=True, log_every=7)) is True
    assert "finished already" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["arguments"]["steps"] == 1000
    assert record["environment"]["torch"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_weights_have_the_permissions_of_other_files(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        start_run(*arguments(tmp_path))
        (tmp_path / "models" / "raptor").mkdir(parents=True)
        weights = tmp_path / "models" / "raptor" / "model.safetensors"
        save_file({"a": torch.zeros(2)}, weights)
        finish_run(tmp_path)
    finally:
        os.umask(before)
    assert weights.stat().st_mode & 0o777 == mode == (tmp_path / "run.json").stat().st_mode & 0o777


def test_an_unfinished_run_wants_resume(tmp_path):
    start_run(*arguments(tmp_path))
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(ValueError, match="unfinished run. Add --resume"):
        start_run(*arguments(tmp_path))
    assert start_run(*arguments(tmp_path, resume=True)) is False


def test_a_run_that_made_nothing_may_be_started_anew(tmp_path):
    start_run(*arguments(tmp_path, steps=7))
    assert start_run(*arguments(tmp_path, steps=8)) is False
    assert json.loads((tmp_path / "run.json").read_text())["arguments"]["steps"] == 8


def test_other_arguments_and_inputs_are_said_in_words(tmp_path):
    start_run(*arguments(tmp_path), inputs={"activations": "abc"})
    finish_run(tmp_path)
    with pytest.raises(ValueError, match="steps: made with 1000, now asked for 50"):
        start_run(*arguments(tmp_path, steps=50), inputs={"activations": "abc"})
    with pytest.raises(ValueError, match="activations: made with 'abc', now asked for 'def'"):
        start_run(*arguments(tmp_path), inputs={"activations": "def"})


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and was not made by this program"):
        start_run(*arguments(tmp_path, resume=True))
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text('{"program": "someone_else", "finished": true}')
    with pytest.raises(ValueError, match="made by someone_else"):
        start_run(*arguments(tmp_path / "other"))


def test_digest_follows_the_content(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no weights and no results"):
        folder_digest(tmp_path)
    (tmp_path / "manifest.json").write_text("1")
    first = folder_digest(tmp_path)
    (tmp_path / "log.jsonl").write_text("does not count")
    assert folder_digest(tmp_path) == first
    (tmp_path / "manifest.json").write_text("2")
    assert folder_digest(tmp_path) != first


def test_lists_of_numbers_take_one_line_and_all_is_read_back(tmp_path):
    content = {
        "rows": [[1, -2.5e-9], [None, 3]],
        "text": "[\n 1,\n 2\n]",
        "names": ["a", "b"],
        "none": [],
    }
    write_json(tmp_path / "file.json", content)
    assert read_json(tmp_path / "file.json") == content
    assert "\n  [1, -2.5e-09],\n  [null, 3]\n" in (tmp_path / "file.json").read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["file.json"]


def test_rounded_numbers_keep_their_first_digits():
    content = {"a": [0.000123456, 1234567.0, float("nan")], "b": (1, "text", None, True)}
    assert rounded(content, 3) == {"a": [0.000123, 1230000.0, None], "b": [1, "text", None, True]}


def test_other_images_are_refused_and_counted(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    files = [str(tmp_path / name) for name in ("a", "b")]
    both = files_fingerprint(files, tmp_path)
    folder = tmp_path / "run"
    start_run(*arguments(folder), images={"images": both})
    finish_run(folder)
    assert start_run(*arguments(folder), images={"images": both}) is True
    one = files_fingerprint(files[:1], tmp_path)
    with pytest.raises(ValueError, match="images: made with '2 files .*, now asked for '1 files"):
        start_run(*arguments(folder), images={"images": one})
    (tmp_path / "b").write_text("c")
    changed = files_fingerprint(files, tmp_path)
    assert changed.digest != both.digest and changed.content_digest == both.content_digest
    with pytest.raises(ValueError, match="images: made with '2 files .*, now asked for '2 files"):
        start_run(*arguments(folder), images={"images": changed})


def test_the_same_inputs_in_another_place_are_the_same_run(tmp_path):
    start_run(*arguments(tmp_path, teacher="here/t"), inputs={"teacher": "abc"})
    finish_run(tmp_path)
    assert start_run(*arguments(tmp_path, teacher="/there/t"), inputs={"teacher": "abc"}) is True


def test_one_process_writes_to_a_folder(tmp_path):
    start_run(*arguments(tmp_path))
    code = "import sys; from raptor_hf.runs.folder import lock_folder; lock_folder(sys.argv[1])"
    command = [sys.executable, "-c", code, tmp_path]
    second = subprocess.run(command, capture_output=True, text=True)
    assert f"is being written by process {os.getpid()} of " in second.stderr
    finish_run(tmp_path)
    assert subprocess.run(command).returncode == 0


def test_recipe_then_flags(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: 5\nlearning_rate: 2.0e-3\nspans: [0-7, 7-12]\n")
    argv = [str(recipe), "--teacher", "t", "--output_dir", "o", "--steps", "9"]
    own, loop = parse_arguments(Arguments, LoopArguments, argv=argv, defaults={"batch_size": 7})
    assert (loop.steps, loop.learning_rate, loop.batch_size) == (9, 2e-3, 7)
    assert own.spans == ["0-7", "7-12"]


def test_empty_values_of_a_recipe_are_defaults_and_empty_lists_are_empty(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("teacher: t\nsteps: null\nspans: []\noutput_dir: out\nseed: ''\n")
    own, loop = parse_arguments(
        Arguments, LoopArguments, argv=[str(recipe)], defaults={"spans": ["0-1"]}
    )
    assert own == Arguments(teacher="t", spans=[]) and loop == LoopArguments(output_dir="out")
    own, _ = parse_arguments(Arguments, LoopArguments, argv=[str(recipe), "--spans", "0-7"])
    assert own.spans == ["0-7"]


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("- steps", "lines like"),
        ("learning_rates: 1.0e-3", "Unknown arguments: --learning_rates"),
        ("a: b: c", "is not YAML"),
    ],
)
def test_wrong_recipes_are_refused(tmp_path, recipe, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    with pytest.raises(ValueError, match=words):
        argv = [str(path), "--teacher", "t", "--output_dir", "o"]
        parse_arguments(Arguments, LoopArguments, argv=argv)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("steps", "-5"), ("learning_rate", "nan"), ("learning_rate", "0"), ("batch_size", "0"),
     ("seed", "5000000000"), ("stepz", "1")],
)  # fmt: skip
def test_wrong_flags_are_refused(flag, value):
    argv = ["--teacher", "t", "--output_dir", "o", f"--{flag}", value]
    with pytest.raises(ValueError, match=f"--{flag}"):
        parse_arguments(Arguments, LoopArguments, argv=argv)


@pytest.mark.parametrize(
    ("content", "words"), [(b'{"steps": ', "is no JSON"), (b'"caf\xe9"', "is not UTF-8")]
)
def test_a_damaged_file_is_named(content, words, tmp_path):
    (tmp_path / "phases.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"phases.json {words}"):
        read_json(tmp_path / "phases.json")


def test_models_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1" / "raptor").mkdir(parents=True)
    assert named_folders("--models", ["a=x/y", "hub/b", "lr=0.1/raptor", "lr=0.1"]) == {
        "a": "x/y", "b": "hub/b", "raptor": "lr=0.1/raptor", "lr=0.1": "lr=0.1",
    }  # fmt: skip
    (tmp_path / "latest").symlink_to("lr=0.1")
    assert named_folders("--models", ["latest"]) == {"latest": "latest"}
    for value in ("runs/lr=0.1/raptor", "../x=y", ".=y", "a=", "=b", "a/b=c"):
        with pytest.raises(ValueError, match=f"or NAME=FOLDER; got {value!r}"):
            named_folders("--models", [value])
    with pytest.raises(ValueError, match="the name 'a' is taken"):
        named_folders("--models", ["a=x", "y/a"])
    with pytest.raises(ValueError, match="the name 'teacher' is taken"):
        named_folders("--models", ["teacher=x"], reserved=["teacher"])

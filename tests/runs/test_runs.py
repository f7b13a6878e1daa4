import dataclasses
import importlib.util
import json
import re
import sys
from typing import get_type_hints

import pytest

from raptor_hf.loop.arguments import LoopArguments
from raptor_hf.runs.arguments import (
    Checked,
    Watching,
    build_arguments,
    marked_names,
    named_folders,
    parse_arguments,
)
from raptor_hf.runs.file_list import FileList
from raptor_hf.runs.files import folder_digest, read_json, rounded, write_json
from raptor_hf.runs.folder import finish_run, start_run
from tests.programs import ROOT, TWO_PROCESSES, run


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


def test_a_run_from_before_an_argument_existed_had_its_default(tmp_path):
    start_run(*arguments(tmp_path))
    finish_run(tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    del record["arguments"]["optimizer"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert start_run(*arguments(tmp_path)) is True
    with pytest.raises(ValueError, match="optimizer: made with 'adamw', now asked for 'muon'"):
        start_run(*arguments(tmp_path, optimizer="muon"))


def test_what_an_argument_is_its_type_says():
    @dataclasses.dataclass
    class Few:
        wide: Watching[int] = 3
        name: Watching[str | None] = None
        depth: int = 2

    assert marked_names(Watching, Few) == marked_names(Watching, Few()) == ["wide", "name"]
    watching = marked_names(Watching, LoopArguments)
    assert {"log_every", "output_dir", "resume"} <= set(watching) and "steps" not in watching
    with pytest.raises(TypeError, match="No argument is called heigth"):
        build_arguments({"depth": 1, "heigth": 2}, Few)


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and was not made by this program"):
        start_run(*arguments(tmp_path, resume=True))
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text('{"program": "someone_else", "finished": true}')
    with pytest.raises(ValueError, match="made by someone_else"):
        start_run(*arguments(tmp_path / "other"))


def test_recipe_then_flags(tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: 5\nlearning_rate: 2.0e-3\nspans: [0-7, 7-12]\n")
    flags = ["--teacher", "t", "--output_dir", "o", "--steps", "9"]
    monkeypatch.setattr(sys, "argv", ["program", str(recipe), *flags])
    own, loop = parse_arguments(Arguments, LoopArguments, defaults={"batch_size": 7})
    assert (loop.steps, loop.learning_rate, loop.batch_size) == (9, 2e-3, 7)
    assert own.spans == ["0-7", "7-12"]


def test_an_unknown_recipe_key_is_named(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stepz: 5\n")
    flags = ["--teacher", "t", "--output_dir", "o"]
    monkeypatch.setattr(sys, "argv", ["program", str(recipe), *flags])
    with pytest.raises((SystemExit, ValueError), match="stepz"):
        parse_arguments(Arguments, LoopArguments)


def test_digest_follows_the_content(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the stage that makes it first"):
        folder_digest(tmp_path)
    (tmp_path / "manifest.json").write_text("1")
    first = folder_digest(tmp_path)
    (tmp_path / "log.jsonl").write_text("does not count")
    assert folder_digest(tmp_path) == first
    (tmp_path / "manifest.json").write_text("2")
    assert folder_digest(tmp_path) != first


def test_an_unknown_recipe_key_is_named_with_the_nearest_one(tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rates: 1.0e-3\n")
    command = ["train.py", str(recipe), "--teacher", "t", "--output_dir", "o"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(ValueError, match="no argument 'learning_rates'.* is 'learning_rate'"):
        parse_arguments(Arguments, LoopArguments)
    recipe.write_text("- steps\n")
    with pytest.raises(ValueError, match=r"lines like `steps: 100`; got \['steps'\]"):
        parse_arguments(Arguments, LoopArguments)


def test_two_processes_on_the_cpu_know_of_each_other(tmp_path):
    script = tmp_path / "count.py"
    script.write_text(
        "from pathlib import Path\n"
        "from raptor_hf.runs.processes import process_state\n"
        "state = process_state()\n"
        "said = f'{state.process_index} of {state.num_processes}'\n"
        "Path(__file__).with_name(said).touch()\n"  # what two processes print may run together
    )
    run(*TWO_PROCESSES, script, ACCELERATE_USE_CPU="true")
    assert sorted(file.name for file in tmp_path.glob("* of *")) == ["0 of 2", "1 of 2"]


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


def test_other_images_are_said_in_words(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    files = [str(tmp_path / name) for name in ("a", "b")]
    both, one = FileList.of_files(files, tmp_path), FileList.of_files(files[:1], tmp_path)
    folder = tmp_path / "run"
    start_run(*arguments(folder), images={"images": both})
    finish_run(folder)
    assert start_run(*arguments(folder), images={"images": both}) is True
    with pytest.raises(ValueError, match=r"other images \(images\): b is gone \(2 files before"):
        start_run(*arguments(folder), images={"images": one})
    with pytest.raises(ValueError, match="the dataset is another version of itself"):
        start_run(*arguments(folder), images={"images": FileList(fingerprint="abc")})
    record = read_json(folder / "run.json")
    del record["images"]  # a run of an earlier version
    write_json(folder / "run.json", record)
    assert start_run(*arguments(folder), images={"images": one}) is True


def test_empty_values_of_a_recipe_are_defaults(tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("teacher: t\nsteps: null\nspans:\nlog_every: []\noutput_dir: out\nseed: ''\n")
    monkeypatch.setattr(sys, "argv", ["program", str(recipe)])
    own, loop = parse_arguments(Arguments, LoopArguments)
    assert own == Arguments(teacher="t") and loop == LoopArguments(output_dir="out")
    recipe.write_text("steps: {a: 1}\n")
    with pytest.raises(ValueError, match="steps takes a value or a list of values"):
        parse_arguments(Arguments, LoopArguments)


def test_models_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1" / "raptor").mkdir(parents=True)
    assert named_folders("--models", ["a=x/y", "hub/b", "lr=0.1/raptor", "lr=0.1"]) == {
        "a": "x/y", "b": "hub/b", "raptor": "lr=0.1/raptor", "lr=0.1": "lr=0.1",
    }  # fmt: skip
    for value in ("runs/lr=0.1/raptor", "../x=y", ".=y", "a=", "=b", "a/b=c"):
        with pytest.raises(ValueError, match=f"--models: there is no folder {value!r}"):
            named_folders("--models", [value])
    with pytest.raises(ValueError, match="the name 'a' is that of another model"):
        named_folders("--models", ["a=x", "y/a"])
    with pytest.raises(ValueError, match="the name 'teacher' is reserved"):
        named_folders("--models", ["teacher=x"], reserved=["teacher"])


def dataclasses_of_programs():
    for folder in ("training", "evaluation", "model_cards"):
        for path in sorted((ROOT / folder).glob("*.py")):
            spec = importlib.util.spec_from_file_location(f"program_{path.stem}", path)
            program = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(program)
            parts = getattr(program, "PARTS", ()) or (getattr(program, "Arguments", None),)
            yield from ((path.stem, part) for part in parts if part)


def test_every_number_of_every_program_has_a_range():
    seen = 0
    for program, part in dataclasses_of_programs():
        for name, hint in get_type_hints(part, include_extras=True).items():
            text = str(hint)
            if "int" in re.findall(r"\w+", text) or "float" in re.findall(r"\w+", text):
                marks = re.search("'(positive|non_negative|share)'", text)
                assert marks and issubclass(part, Checked), f"{program}: {name}"
                seen += 1
    assert seen > 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": -5}, "--steps must be a number ≥ 0; got -5"),
        ({"learning_rate": -1.0}, "--learning_rate must be a number ≥ 0; got -1.0"),
        ({"learning_rate": float("nan")}, "--learning_rate must be a number ≥ 0; got nan"),
        ({"batch_size": 0}, "--batch_size must be a number > 0; got 0"),
        ({"max_grad_norm": float("inf")}, "--max_grad_norm must be a number > 0; got inf"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **changes)


def test_each_layer_is_extracted_once():
    program = next(part for name, part in dataclasses_of_programs() if name.startswith("extract"))
    with pytest.raises(ValueError, match=r"--layers takes each layer once; got \[3, 3\]"):
        program(teacher="t", output_dir="out", layers=[3, 3])

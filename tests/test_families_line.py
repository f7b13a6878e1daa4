"""Teachers of other families through the programs, as a user runs them: slow."""

import sys

import pytest

from raptor_hf.data import make_processor
from raptor_hf.runs.files import read_json
from tests.families import HOSTS, tiny_model
from tests.programs import run


def save(family, folder):
    """A tiny teacher with a processor: a bare one, or the model around it."""
    model = HOSTS[family]()[0] if family in HOSTS else tiny_model(family)
    model.save_pretrained(folder)
    make_processor(16).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["siglip_vision_model", "dinov3_vit", "CLIPModel"])
def test_from_a_teacher_to_its_report(family, tmp_path):
    """Without a cls token, with rotated queries, within another model."""
    teacher, out = tmp_path / "teacher", tmp_path / "out"
    save(family, teacher)

    def program(name, *arguments):
        return run(sys.executable, name, "--teacher", teacher, *arguments).stdout

    digits = ("--dataset", "digits", "--split", "train")
    program("training/find_phases.py", *digits, "--num_images", 100, "--k", 2,
            "--method", "maxcut", "--output_dir", out / "phases")  # fmt: skip
    program("training/extract_activations.py", *digits, "--views", 1, "--output_dir", out / "store")
    stored, online = ("--activations", out / "store"), ("--activations", "online", *digits)
    learn = ("--phases_file", out / "phases" / "phases.json", "--k", 2, "--batch_size", 16,
             "--warmup_steps", 2)  # fmt: skip
    for name, source, steps in (("raptor", stored, 40), ("online", online, 3)):
        plan = program("training/distill_raptor.py", *source, *learn, "--steps", steps,
                       "--output_dir", out / name, "--dry_run")  # fmt: skip
        assert f"{steps} steps of 16" in plan
        program("training/distill_raptor.py", *source, *learn, "--steps", steps,
                "--output_dir", out / name, "--validation_dataset", "digits",
                "--validation_split", "test", "--validate_every", steps,
                "--validation_images", 50)  # fmt: skip
    models = ("--models", f"raptor={out / 'raptor'}", "--steps", 20, "--warmup_steps", 2)
    for task, data in (("classification", "digits"), ("segmentation", "digit_scenes")):
        program("evaluation/probe.py", "--task", task, "--dataset", data, *models,
                "--batch_size", 16, "--output_dir", out / task)  # fmt: skip
    run(sys.executable, "-m", "evaluation.dynamics", "--dataset", "digits", "--split", "test",
        "--num_images", 40, "--phases_file", out / "phases" / "phases.json",
        "--model", f"teacher={teacher}", f"raptor={out / 'raptor'}",
        "--output_dir", out / "dynamics")  # fmt: skip
    run(sys.executable, "evaluation/report.py", "--phases", out / "phases",
        "--results", out / "classification" / "results", out / "segmentation" / "results",
        "--output_dir", out / "report")  # fmt: skip
    measured = read_json(out / "classification" / "results" / "raptor_r2.json")["metrics"]
    groups = measured["mean"].keys()
    assert ("cls" in groups) == (family != "siglip_vision_model")
    assert "raptor" in (out / "report" / "report.md").read_text(encoding="utf-8")

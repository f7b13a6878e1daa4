"""Model cards: a template filled from result files, with a usage snippet that has been run."""

import json
import re
import subprocess
import sys
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoConfig

from ..reports.tables import COLUMNS, mean_std, values_of
from ..runs.files import folder_digest, read_json
from ..tasks.task import TASKS, Task

# per task: the Hub's names of the task and of its metric, and the answer that a snippet prints
ON_THE_HUB = {
    "classification": (
        "image-classification",
        "accuracy",
        "model.config.id2label[outputs.logits[0].argmax().item()]",
    ),
    "segmentation": ("image-segmentation", "mean_iou", "outputs.logits.argmax(1).unique()"),
    "depth": ("depth-estimation", "rmse", "outputs.predicted_depth.mean()"),
}
COMMIT = "<commit>"  # in a snippet, until the model has been uploaded
_SNIPPET = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, {auto_class}

name, revision = {name}, {revision}  # whose code is run, and of which commit
processor = AutoImageProcessor.from_pretrained(name, revision=revision)
model = {auto_class}.from_pretrained(name, revision=revision, trust_remote_code=True)
image = Image.new("RGB", (640, 480), (90, 120, 200))  # yours: Image.open("photo.jpg")
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"), output_hidden_states=True)
print({answer}, len(outputs.hidden_states))"""


def task_of(model_dir: str | Path) -> type[Task]:
    """Return the task that a saved Raptor has a head for; a ValueError if it has none."""
    architectures = AutoConfig.from_pretrained(model_dir).architectures
    for task in TASKS.values():
        if architectures == [task.model_class.__name__]:
            return task
    raise ValueError(
        f"{model_dir} holds {architectures}; a card needs a Raptor with a head, as "
        "evaluation/probe.py saves it in its models/."
    )


def usage_snippet(name: str, task: type[Task]) -> str:
    """Return code that uses a model (Hub id or folder) with transformers alone."""
    return _SNIPPET.format(
        name=json.dumps(name),
        revision=json.dumps(COMMIT),
        auto_class=task.auto_class.__name__,
        answer=ON_THE_HUB[task.name][2],
    )


def run_snippet(snippet: str, folder: Path) -> str:
    """Run a usage snippet in `folder` without raptor_hf; return its output, or a RuntimeError."""
    code = f'import sys\nsys.modules["raptor_hf"] = None\n{snippet}'
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"The usage snippet of the model card fails:\n{done.stderr[-2000:]}")
    return done.stdout


def write_model_card(
    model_dir: str | Path,
    results: list[dict],
    template: str | Path,
    *,
    repo_id: str | None = None,
    license: str | None = None,
) -> Path:
    """Render the card of a saved model, run its snippet, and write it beside the weights.

    Args:
        model_dir: folder of a Raptor with a head; its name is the model's in `results`.
        results: as from `reports.load_results`.
        template: Jinja template of the card.
        repo_id: repository that the snippet loads, and heading; default: the folder.
        license: of the weights: their teacher's.

    Returns:
        The file, `README.md`.

    Raises:
        ValueError: no head, no results of it or its teacher, results or ONNX files of another.
        RuntimeError: the snippet fails.
    """
    model_dir = Path(model_dir).resolve()
    name, task = model_dir.name, task_of(model_dir)
    rows = [row for row in results if row["model"] == name and row["task"] == task.name]
    teachers = [row for row in results if row["model"] == "teacher" and row["task"] == task.name]
    if not rows or not teachers:
        raise ValueError(
            f"The card of {model_dir} needs {task.name} results of {name!r} and of 'teacher'."
        )
    result = rows[0]

    # what the programs that trained and exported the model wrote beside the weights
    files = [model_dir / "training.json", model_dir / "export.json"]
    training, exported = (read_json(file) if file.is_file() else None for file in files)
    if training and training not in [row.get("training") for row in rows]:
        raise ValueError(f"The results of {name!r} are those of another model than {model_dir}.")
    if exported and exported["weights"] != folder_digest(model_dir):
        raise ValueError(f"{files[1]} is about other weights: run model_cards/export.py again.")

    # versions of the libraries, and the size of the blocks
    versions = [f"{key} {value}" for key, value in result["environment"].items() if value]
    share = result["block_parameters"] / teachers[0]["block_parameters"]
    card = ModelCard.from_template(
        card_metadata(name, task, results, training, title=repo_id or name, license=license),
        template_path=str(template),
        title=repo_id or name,
        snippet=usage_snippet(repo_id or name, task),
        phases=result["phases"],
        block_share=f"{100 * share:.1f}",
        num_images=f"{result['num_images']:,}",
        num_seeds=len(rows),
        dataset=result["dataset"],
        rows=results_table(name, task, results),
        training=training,
        exported=exported,
        versions=", ".join(versions),
    )

    # a card is only written if its snippet works
    run_snippet(usage_snippet(str(model_dir), task), model_dir.parent)
    card.save(model_dir / "README.md")
    return model_dir / "README.md"


def card_metadata(
    name: str,
    task: type[Task],
    results: list[dict],
    training: dict | None,
    *,
    title: str,
    license: str | None,
) -> ModelCardData:
    """Return the metadata that the Hub reads: task, teacher, licence, datasets, figures."""
    # a figure of the task, and R² where there is one
    pipeline_tag, metric, _ = ON_THE_HUB[task.name]
    figures = [(pipeline_tag, metric, values_of(results, name, task.name, task.score))]
    r2 = values_of(results, name, "r2", "mean", "all")
    if len(r2):
        figures.append(("image-feature-extraction", "r2", r2))
    # on which data they were measured
    result = next(row for row in results if (row["model"], row["task"]) == (name, task.name))
    dataset = {"dataset_name": result["dataset"], "dataset_split": result["split"]}
    dataset["dataset_type"] = re.sub(r"[^\w./-]+", "-", result["dataset"])  # as the Hub demands
    evaluations = []
    for task_type, metric_type, values in figures:
        value = round(float(values.mean()), 4)
        figure = {"task_type": task_type, "metric_type": metric_type, "metric_value": value}
        evaluations.append(EvalResult(**figure, **dataset))

    # the Hub links to these: a local teacher has no revision, a local dataset no owner
    base_model, datasets = None, None
    if training and training["teacher"]["revision"]:
        base_model = training["teacher"]["name"]
    if training and "/" in (training["dataset"] or ""):
        datasets = [training["dataset"]]
    return ModelCardData(
        model_name=title,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        license=license,
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        datasets=datasets,
        tags=["raptor", "block-recurrent", "vision-transformer", "distillation"],
        metrics=[metric for _, metric, _ in figures],
        eval_results=evaluations,
    )


def results_table(name: str, task: type[Task], results: list[dict]) -> list[tuple[str, str, str]]:
    """Return the rows of a card's table: figure, value of the model, value of its teacher."""
    column = COLUMNS[task.name]
    scores = [values_of(results, model, task.name, column.metric) for model in (name, "teacher")]
    cells = [mean_std(column.scale * values, column.digits) for values in scores]
    rows = [(f"linear probe: {column.heading}", *cells)]
    for group, heading in {"all": "all tokens", "cls": "cls", "patches": "patches"}.items():
        r2 = values_of(results, name, "r2", "mean", group)
        if len(r2):
            rows.append((f"R² of the hidden states, {heading}", mean_std(r2, 3), "1"))
    return rows

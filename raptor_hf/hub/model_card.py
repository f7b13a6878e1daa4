"""Model cards: a template filled from result files, with a usage snippet that has been run."""

import json
import subprocess
import sys
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoConfig

from ..distillation.provenance import RECIPE
from ..reports.tables import COLUMNS, mean_std, values_of
from ..runs.files import public_name
from ..tasks.task import TASKS, Task

_TAGS = ["raptor", "block-recurrent", "vision-transformer", "distillation"]
_CITATION = """\
@inproceedings{jacobs2026blockrecurrent,
  title = {Block-Recurrent Dynamics in Vision Transformers},
  author = {Jacobs and Fel and Hakim and Brondetta and Ba and Keller},
  booktitle = {International Conference on Learning Representations},
  year = {2026},
  note = {arXiv 2512.19941},
}"""
# of a task: the Hub's name of it, of its metric, and what a snippet prints of a model's answer
ON_THE_HUB = {
    "classification": (
        "image-classification",
        "accuracy",
        "model.config.id2label[outputs.logits[0].argmax().item()]",
    ),
    "segmentation": ("image-segmentation", "mean_iou", "outputs.logits.argmax(1).unique()"),
    "depth": ("depth-estimation", "rmse", "outputs.predicted_depth.mean()"),
}
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


def usage_snippet(name: str, task: type[Task], revision: str = "<commit>") -> str:
    """Return the code that uses a model with transformers alone.

    Args:
        name: a Hub id, or a folder, for which the revision has no meaning.
        revision: the commit that is trusted.
    """
    return _SNIPPET.format(
        name=json.dumps(name),
        revision=json.dumps(revision),
        auto_class=task.auto_class.__name__,
        answer=ON_THE_HUB[task.name][2],
    )


def run_snippet(snippet: str, folder: Path) -> str:
    """Run a card's Python snippet in a process of its own; returns what it printed.

    Raises:
        RuntimeError: it failed; its error output is the message.
    """
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=folder, capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        raise RuntimeError(f"The usage snippet of the model card fails:\n{done.stderr[-2000:]}")
    return done.stdout


def task_of(model_dir: str | Path) -> type[Task]:
    """Return the task that a saved Raptor has a head for.

    Raises:
        ValueError: it has none.
        OSError: no model in this folder.
    """
    architectures = AutoConfig.from_pretrained(model_dir).architectures
    for task in TASKS.values():
        if architectures == [task.model_class.__name__]:
            return task
    raise ValueError(
        f"{model_dir} holds {architectures}; a card is made of a Raptor with a head, as "
        "evaluation/probe.py saves it in its models/."
    )


def _card_metadata(
    name: str, task: type[Task], results: list[dict], *, title: str, license: str
) -> ModelCardData:
    """Return what the Hub reads of a card: library, task, teacher, licence, data, figures.

    Args:
        results: of the model: of its task, and `r2` where there is one.
    """
    facts = next(result for result in results if result["task"] == task.name)
    training = facts.get("training") or {"teacher": {"revision": None}, "dataset": None}
    dataset = public_name(facts["dataset"])
    pipeline_tag, metric_type, _ = ON_THE_HUB[task.name]
    figures = [(pipeline_tag, metric_type, values_of(results, name, task.name, task.score))]
    r2 = values_of(results, name, "r2", "mean", "all")
    figures += [("image-feature-extraction", "r2", r2)] if len(r2) else []
    return ModelCardData(
        model_name=title,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        license=license,
        base_model=training["teacher"]["name"] if training["teacher"]["revision"] else None,
        datasets=[training["dataset"]] if training["dataset"] else None,
        tags=_TAGS,
        metrics=[metric for _, metric, _ in figures],
        eval_results=[
            EvalResult(
                task_type=task_type,
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split=facts["split"],
                metric_type=metric,
                metric_value=round(float(values.mean()), 4),
            )
            for task_type, metric, values in figures
        ],
    )


def results_table(name: str, task: type[Task], results: list[dict]) -> list[tuple[str, str, str]]:
    """Return rows of a card's table: a figure, of the model, of its teacher."""
    column = COLUMNS[task.name]
    scores = [values_of(results, m, task.name, column.metric) for m in (name, "teacher")]
    cells = [mean_std(column.scale * values, column.digits) for values in scores]
    rows = [(f"linear probe: {column.heading}", *cells)]
    groups = {"all": "all tokens", "cls": "cls", "patches": "patches"}
    for group, heading in groups.items():
        r2 = values_of(results, name, "r2", "mean", group)
        if len(r2):
            rows.append((f"R² of the hidden states, {heading}", mean_std(r2, 3), "1"))
    return rows


def make_model_card(
    name: str,
    task: type[Task],
    results: list[dict],
    template: str | Path,
    *,
    snippet: str,
    title: str | None = None,
    license: str = "apache-2.0",
) -> ModelCard:
    """Return the card of a model, rendered from its results.

    Args:
        name: of the model among the results (`tables.load_results`).
        template: Jinja template of the card.
        snippet: how it is used.
        title: what the card calls it; default: its name.

    Raises:
        ValueError: no results of this model, or of its teacher, on this task.
    """
    own_results = [result for result in results if result["model"] == name]
    facts = next((result for result in own_results if result["task"] == task.name), None)
    if facts is None:
        raise ValueError(f"There are no {task.name} results of {name!r} to make its card from.")
    teachers = [r for r in results if (r["model"], r["task"]) == ("teacher", task.name)]
    if not teachers:
        raise ValueError(f"There are no {task.name} results of the teacher to compare with.")
    title = title or name
    return ModelCard.from_template(
        _card_metadata(name, task, own_results, title=title, license=license),
        template_path=str(template),
        title=title,
        citation=_CITATION,
        snippet=snippet,
        phases=facts["phases"],
        block_share=f"{100 * facts['block_parameters'] / teachers[0]['block_parameters']:.1f}",
        num_images=f"{facts['num_images']:,}",
        num_seeds=len(values_of(results, name, task.name, task.score)),
        dataset=public_name(facts["dataset"]),
        rows=results_table(name, task, results),
        training=facts.get("training"),
        versions=", ".join(
            f"{key} {value}" for key, value in facts["environment"].items() if value
        ),
    )


def write_model_card(
    model_dir: str | Path, results: list[dict], template: str | Path, *, title: str | None = None
) -> Path:
    """Render the card of a saved model, run its snippet, and only then write it.

    Args:
        model_dir: folder of a Raptor with a head; its name is the model's in `results`.
        template: Jinja template of the card.
        title: what the card calls it; default: its name.

    Raises:
        ValueError: no results of this model, or no head.
        RuntimeError: the usage snippet fails.
    """
    model_dir = Path(model_dir).resolve()
    task = task_of(model_dir)
    snippet = usage_snippet(model_dir.name, task)
    card = make_model_card(model_dir.name, task, results, template, snippet=snippet, title=title)
    run_snippet(snippet, model_dir.parent)
    card.save(model_dir / "README.md")
    return model_dir / "README.md"


def planned_card(recipe: str | Path, published: dict, template: str | Path) -> ModelCard:
    """Return the card of a model that nobody has trained yet: its recipe, and no figure of ours.

    Args:
        recipe: of `distill_raptor.py`, headed by a comment with the command and the cost.
        published: the paper's figures (`evaluation/results/published.json`).
        template: Jinja template of such a card.

    Raises:
        ValueError: the recipe has no phases.
    """
    text = Path(recipe).read_text(encoding="utf-8")
    fields = yaml.safe_load(text)
    if not fields.get("phases"):
        raise ValueError(f"{recipe} has no phases: a planned card is made of such a recipe.")
    heading = [line for line in text.splitlines() if line.startswith("#")]
    dataset = {"data/imagenet": "ILSVRC/imagenet-1k"}.get(
        fields["validation_dataset"], fields["validation_dataset"]
    )
    return ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag="image-feature-extraction",
            license="apache-2.0",
            base_model=fields["teacher"],
            datasets=[dataset],
            tags=[*_TAGS, "not-trained-yet"],
        ),
        template_path=str(template),
        citation=_CITATION,
        title=Path(recipe).stem,
        recipe=Path(recipe).name,
        teacher=fields["teacher"],
        dataset=dataset,
        phases=fields["phases"],
        arguments={key: fields[key] for key in RECIPE if key in fields},
        heading="\n".join(line.removeprefix("#").removeprefix(" ") for line in heading),
        published=[row for row in published["results"] if row["phases"] == fields["phases"]],
        source=published["source"]["citation"],
    )

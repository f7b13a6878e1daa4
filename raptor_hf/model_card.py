"""Model cards: a template filled from result files, with a usage snippet that has been run."""

import subprocess
import sys
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .tables import mean_std, values_of

SNIPPET = """\
import torch
import raptor_hf  # registers the model with transformers
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("{name}")
size, channels = model.config.image_size, model.config.num_channels
pixel_values = torch.randn(1, channels, size, size)  # an AutoImageProcessor makes real ones
with torch.no_grad():
    outputs = model(pixel_values)
print(outputs.logits.argmax(-1), len(outputs.hidden_states))"""


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


def card_metadata(name: str, facts: dict, accuracy: float) -> ModelCardData:
    """What the Hub reads of a card: library, task, licence and the measured accuracy."""
    return ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="image-classification",
        license="apache-2.0",
        tags=["raptor", "block-recurrent", "vision-transformer"],
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=facts["dataset"],
                dataset_name=facts["dataset"],
                dataset_split=facts["split"],
                metric_type="accuracy",
                metric_value=round(accuracy, 4),
            )
        ],
    )


def write_model_card(
    model_dir: str | Path, results: list[dict], template: str | Path, *, teacher: str = "a teacher"
) -> Path:
    """Render the card of a model from its results, run its snippet, and only then write it.

    Args:
        model_dir: folder of a `RaptorForImageClassification`; its name is the model's in `results`.
        results: result files (`tables.load_results`).
        template: Jinja template of the card.
        teacher: name of the teacher for the text.

    Raises:
        ValueError: no results of this model.
        RuntimeError: the usage snippet fails.
    """
    model_dir = Path(model_dir)
    name = model_dir.name
    mine = [result for result in results if result["model"] == name]
    if not mine:
        raise ValueError(f"There are no results of {name!r} to make its card from.")
    facts = mine[0]
    teacher_facts = next(result for result in results if result["model"] == "teacher")
    accuracy = values_of(results, name, "classification", "accuracy")
    snippet = SNIPPET.format(name=name)
    run_snippet(snippet, model_dir.parent)
    card = ModelCard.from_template(
        card_metadata(name, facts, float(accuracy.mean())),
        template_path=str(template),
        name=name,
        snippet=snippet,
        phases=facts["phases"],
        block_share=f"{100 * facts['block_parameters'] / teacher_facts['block_parameters']:.1f}",
        num_images=facts["num_images"],
        num_seeds=len(accuracy),
        dataset=facts["dataset"],
        accuracy=mean_std(100 * accuracy, 1),
        teacher_accuracy=mean_std(
            100 * values_of(results, "teacher", "classification", "accuracy"), 1
        ),
        r2={
            group: mean_std(values_of(results, name, "r2", "mean", group), 3)
            for group in ("all", "cls", "patches")
        },
        teacher=teacher,
        versions=", ".join(
            f"{key} {value}" for key, value in facts["environment"].items() if value
        ),
    )
    card.save(model_dir / "README.md")
    return model_dir / "README.md"

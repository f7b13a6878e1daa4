"""To the Hub: models that were tried as strangers will use them, and whole activation datasets.

A repository's `main` moves once, when every file has been uploaded: what is cut off in the middle
leaves it as it was, and the same call goes on. Tokens are huggingface_hub's affair alone (`hf auth
login`, or HF_TOKEN): none is asked for, printed or written here.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from .activation_format import MANIFEST, dataset_card, read_manifest
from .activations import verify_activations
from .model_card import make_model_card, run_snippet, task_of, usage_snippet
from .provenance import public_name
from .teachers import load_processor

# What a stranger's machine makes of a folder: only transformers, and the code that lies there.
READ_BACK = """
import sys
sys.modules["raptor_hf"] = None  # not installed
import transformers
from safetensors.torch import load_file, save_file

folder, auto_class, images, outputs = sys.argv[1:]
model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
states = model(load_file(images)["pixel_values"]).hidden_states
answer = model(load_file(images)["pixel_values"])[0]
named = {str(layer): state.detach().clone() for layer, state in enumerate(states)}
save_file({**named, "answer": answer.detach().clone()}, outputs)
"""


def stage_model(
    model_dir: str | Path,
    folder: str | Path,
    results: list[dict],
    template: str | Path,
    *,
    title: str,
    license: str = "apache-2.0",
) -> None:
    """Write the folder that will be a model's repository, and try it.

    Nothing is copied: weights, configuration, processor and code are saved anew, so that neither
    logs nor the names of local folders go along. Then the snippet of the card is run, and the
    folder is loaded without this package and must give the model's own outputs, bit for bit.

    Args:
        model_dir: a Raptor with a head, by the name that it has in `results`.
        folder: where to write; it must be empty or absent.
        results: result files (`tables.load_results`).
        template: Jinja template of the card.
        title: what the card calls the model.

    Raises:
        ValueError: no head, no results of this model, or a folder that is not empty.
        RuntimeError: the snippet fails, or other outputs than the model's.
    """
    model_dir, folder = Path(model_dir), Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty. Choose another folder, or delete it.")
    task = task_of(model_dir)
    model = task.model_class.from_pretrained(model_dir, dtype=torch.float32)
    processor = load_processor(str(model_dir))
    options = {"title": title, "license": license}
    card = make_model_card(
        model_dir.name, task, results, template, snippet=usage_snippet(title, task), **options
    )
    folder.mkdir(parents=True, exist_ok=True)
    for config in (model.config, model.config.teacher_config):
        config.name_or_path = ""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    card.save(folder / "README.md")
    run_snippet(usage_snippet(str(folder.resolve()), task), folder)
    check_read_back(model, folder, task.auto_class.__name__)


@torch.no_grad()
def check_read_back(model: PreTrainedModel, folder: Path, auto_class: str) -> None:
    """Load a folder in a process without this package and compare; errors as `stage_model`."""
    images = torch.randn(
        model.dummy_inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(0)
    )
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / f"{name}.safetensors" for name in ("images", "outputs")]
        save_file({"pixel_values": images}, files[0])
        done = subprocess.run(
            [sys.executable, "-c", READ_BACK, folder.resolve(), auto_class, *files],
            cwd=scratch, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{folder} can't be loaded again:\n{done.stderr[-2000:]}")
        found = load_file(files[1])
    outputs = model.eval()(images, output_hidden_states=True)
    expected = {str(layer): state for layer, state in enumerate(outputs.hidden_states)}
    expected["answer"] = outputs[0]
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    if different:
        raise RuntimeError(
            f"The model in {folder} gives other outputs than the one it was saved from "
            f"(layers {different}). It was not published."
        )


def publish_model(folder: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Upload a staged model; returns the commit that its card tells people to trust.

    The first commit holds all files, the second one only the card anew, whose snippet now names the
    first: a commit can't name itself.
    """
    folder, api = Path(folder), HfApi()
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    files = sorted(path for path in folder.iterdir() if path.is_file())
    additions = [CommitOperationAdd(path.name, path) for path in files]
    commit = api.create_commit(repo_id, additions, commit_message="Raptor, its code and its card")
    card, task = folder / "README.md", task_of(folder)
    text = card.read_text()
    unpinned = next(line for line in text.splitlines() if line.startswith("name, revision = "))
    pinned = usage_snippet(repo_id, task, commit.oid)
    line = next(line for line in pinned.splitlines() if line.startswith("name, revision = "))
    card.write_text(text.replace(unpinned, line))
    addition = CommitOperationAdd("README.md", card)
    api.create_commit(repo_id, [addition], commit_message="The card names the revision to load")
    return commit.oid


def activation_files(path: str | Path) -> dict[str, Path | bytes]:
    """The files of an activation dataset as they are published, after a check of all of them.

    Manifest and card are written anew: a teacher in a local folder goes by the folder's name.

    Raises:
        FileNotFoundError: no finished dataset.
        ValueError: it is damaged; each fault is named.
    """
    path = Path(path)
    if problems := list(verify_activations(path)):
        raise ValueError("\n".join(problems))
    manifest = read_manifest(path)
    manifest["teacher"]["name"] = public_name(manifest["teacher"]["name"])
    names = ["dataset_info.json", "state.json", *manifest["shards"]]
    return {
        "README.md": dataset_card(manifest).encode(),
        MANIFEST: (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode(),
        **{name: path / name for name in names},
    }


def publish_activations(
    files: dict[str, Path | bytes], repo_id: str, *, private: bool = False
) -> str:
    """Upload an activation dataset (`activation_files`) in one commit; returns it."""
    api = HfApi()
    repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
    additions = [CommitOperationAdd(name, content) for name, content in files.items()]
    commit = api.create_commit(
        repo_id, additions, repo_type="dataset", commit_message="Activations of a teacher"
    )
    return commit.oid

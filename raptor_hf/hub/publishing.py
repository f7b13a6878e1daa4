"""To the Hub: models that were tried as strangers will use them, and whole activation datasets.

A repository's `main` moves when every file has been uploaded: what is cut off in the middle leaves
it as it was, and the same call goes on. A new version takes the weights or shards of the old one
away. Tokens are huggingface_hub's affair alone (`hf auth login`, or HF_TOKEN): none is asked for,
printed or written here.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..activations.format import MANIFEST, dataset_card, read_manifest, verify_activations
from ..runs.files import public_name
from ..teachers import load_processor
from .model_card import make_model_card, run_snippet, task_of, usage_snippet

# files that a new version of a repository replaces as a whole
_OF_A_VERSION = (".safetensors", ".safetensors.index.json", ".bin", ".arrow")
# What a stranger's machine makes of a folder: only transformers, and the code that lies there.
_READ_BACK = """
import sys
sys.modules["raptor_hf"] = None  # not installed
import transformers
from safetensors.torch import load_file, save_file

folder, auto_class, images, weights, outputs = sys.argv[1:]
model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
found = model(load_file(images)["pixel_values"], output_hidden_states=True)
tensors = {str(layer): state for layer, state in enumerate(found.hidden_states)}
tensors["answer"] = found[0]
for file, tensors in {weights: model.state_dict(), outputs: tensors}.items():
    save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, file)
"""
# Largest error of outputs, as a share of the largest value. Kernels are chosen by how memory lies,
# and each rounds in its own way: a sound model need not give the same last bits twice. Seen: 7e-7
# through a Raptor of the size of DINOv2-B.
_OUTPUT_TOLERANCE = 1e-5
_TINY = torch.finfo(torch.float32).tiny  # instead of 0, where all values are 0


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
    folder is loaded without this package and must give the model's own weights, bit for bit, and
    its outputs to `_OUTPUT_TOLERANCE`.

    Args:
        model_dir: a Raptor with a head, by the name that it has in `results`.
        folder: where to write; it must be empty or absent.
        results: result files (`tables.load_results`).
        template: Jinja template of the card.
        title: what the card calls the model.

    Raises:
        ValueError: no head, no results of this model, or a folder that is not empty.
        RuntimeError: the snippet fails, or other weights or outputs than the model's.
    """
    model_dir, folder = Path(model_dir).resolve(), Path(folder)
    _check_empty(folder)
    task = task_of(model_dir)
    model = task.model_class.from_pretrained(model_dir, dtype=torch.float32)
    processor = load_processor(str(model_dir))
    options = {"title": title, "license": license}
    card = make_model_card(
        model_dir.name, task, results, template, snippet=usage_snippet(title, task), **options
    )
    original = model.config.teacher_config
    original.name_or_path = public_name(original.name_or_path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:  # what fails leaves nothing
        staged = Path(scratch) / folder.name
        model.save_pretrained(staged)
        processor.save_pretrained(staged)
        card.save(staged / "README.md")
        run_snippet(usage_snippet(str(staged.resolve()), task), staged)
        check_read_back(model, staged, task.auto_class.__name__)
        staged.rename(folder)


def _check_empty(folder: Path) -> None:
    """Refuse a folder that holds something, with a ValueError."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty. Choose another folder, or delete it.")


@torch.no_grad()
def check_read_back(model: PreTrainedModel, folder: Path, auto_class: str) -> None:
    """Load a folder in a process without this package and compare; errors as `stage_model`."""
    images = torch.randn(
        model.dummy_inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(0)
    )
    with tempfile.TemporaryDirectory() as scratch:
        names = ("images", "weights", "outputs")
        files = [Path(scratch) / f"{name}.safetensors" for name in names]
        save_file({"pixel_values": images}, files[0])
        done = subprocess.run(
            [sys.executable, "-c", _READ_BACK, folder.resolve(), auto_class, *files],
            cwd=scratch, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{folder} can't be loaded again:\n{done.stderr[-2000:]}")
        weights, outputs_read = map(load_file, files[1:])
    check_weights(weights, model.state_dict(), folder)
    outputs = model.eval()(images, output_hidden_states=True)
    expected = {str(layer): state for layer, state in enumerate(outputs.hidden_states)}
    expected["answer"] = outputs[0]
    check_outputs(outputs_read, expected, folder)


def check_weights(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], folder: Path
) -> None:
    """Refuse weights that are not the expected ones, bit for bit; errors as `stage_model`."""
    different = [
        name
        for name in sorted({*found, *expected})
        if name not in found or name not in expected or not torch.equal(found[name], expected[name])
    ]
    if different:
        raise RuntimeError(
            f"The model in {folder} holds other weights than the one it was saved from, which it "
            f"must hold bit for bit ({len(different)} differ: {different[:5]}). It was not "
            "published."
        )


def check_outputs(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], folder: Path
) -> None:
    """Refuse outputs that are not the expected ones to a tolerance; errors as `stage_model`."""
    errors = {
        name: float((found[name] - tensor).abs().max() / tensor.abs().max().clamp(min=_TINY))
        for name, tensor in expected.items()
    }
    # a NaN is no error that is small enough
    different = {name: error for name, error in errors.items() if not error <= _OUTPUT_TOLERANCE}
    if different:
        listed = ", ".join(f"{name}: {error:.1e}" for name, error in different.items())
        raise RuntimeError(
            f"The model in {folder} gives other outputs than the one it was saved from: expected "
            f"errors up to {_OUTPUT_TOLERANCE:.0e} of the largest value, found {listed} (layers by "
            "their number). It was not published."
        )


def publish_model(folder: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Upload a staged model; return the commit that its card tells people to trust.

    The first commit holds the model, the second one the card, whose snippet names the first.

    Raises:
        ValueError: a repository that others see, where a private one is wanted.
    """
    folder, api = Path(folder), HfApi()
    repo_id = _open_repository(api, repo_id, "model", private)
    card, task = folder / "README.md", task_of(folder)
    files = {path.name: path for path in folder.iterdir() if path.is_file() and path != card}
    commit = _commit_files(api, repo_id, "model", files, "A Raptor and its code")
    pinned = usage_snippet(repo_id, task, commit).splitlines()
    [line] = [line for line in pinned if line.startswith("name, revision = ")]
    lines = card.read_text(encoding="utf-8").splitlines()
    lines = [line if old.startswith("name, revision = ") else old for old in lines]
    text = ("\n".join(lines) + "\n").encode()
    addition = CommitOperationAdd("README.md", text)
    api.create_commit(repo_id, [addition], commit_message="The card names the revision to load")
    return commit


def _open_repository(api: HfApi, repo_id: str, repo_type: str, private: bool) -> str:
    """Create a repository unless it is there; its full name. Errors as `publish_model`."""
    created = api.create_repo(repo_id, repo_type=repo_type, private=private or None, exist_ok=True)
    if private and not api.repo_info(created.repo_id, repo_type=repo_type).private:
        raise ValueError(
            f"{created.repo_id} is there already, and public. Nothing was uploaded: make it "
            "private in its settings, choose another --repo_id, or leave out --private."
        )
    return created.repo_id


def _commit_files(
    api: HfApi, repo_id: str, repo_type: str, files: dict[str, Path | bytes], message: str
) -> str:
    """Commit these files and delete the weights or shards of a version before."""
    files_before = api.list_repo_files(repo_id, repo_type=repo_type)
    stale = [name for name in files_before if name.endswith(_OF_A_VERSION) and name not in files]
    operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
    operations += [CommitOperationDelete(name) for name in stale]
    commit = api.create_commit(repo_id, operations, repo_type=repo_type, commit_message=message)
    return commit.oid


def activation_files(path: str | Path) -> dict[str, Path | bytes]:
    """Check an activation dataset and return its files as they are published.

    Manifest and card are written anew: a teacher in a local folder goes by the folder's name.

    Raises:
        FileNotFoundError: no finished dataset.
        ValueError: it is damaged; each fault is named.
    """
    path = Path(path)
    if problems := list(verify_activations(path)):
        raise ValueError("\n".join(problems))
    manifest = read_manifest(path)
    teacher = manifest["teacher"]
    if teacher["revision"] is None:  # not of the Hub
        teacher["name"] = Path(teacher["name"]).name
    names = ["dataset_info.json", "state.json", *manifest["shards"]]
    return {
        "README.md": dataset_card(manifest).encode(),
        MANIFEST: (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode(),
        **{name: path / name for name in names},
    }


def write_files(files: dict[str, Path | bytes], folder: str | Path) -> None:
    """Write `activation_files` as a folder to look at: shards are links to where they lie.

    Raises:
        ValueError: the folder is not empty.
    """
    folder = Path(folder)
    _check_empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (folder / name).symlink_to(content.resolve())


def publish_activations(
    files: dict[str, Path | bytes], repo_id: str, *, private: bool = False
) -> str:
    """Upload `activation_files` in one commit; return it. Errors as `publish_model`."""
    api = HfApi()
    repo_id = _open_repository(api, repo_id, "dataset", private)
    return _commit_files(api, repo_id, "dataset", files, "Activations of a teacher")


def publish_dataset(
    files: dict[str, Path | bytes], repo_id: str, *, private: bool = False, message: str
) -> str:
    """Upload the files of a plain dataset in one commit; return it.

    Raises:
        ValueError: a repository that others see, where a private one is wanted, or one that holds
            a dataset of another kind, whose shards would go.
    """
    api = HfApi()
    repo_id = _open_repository(api, repo_id, "dataset", private)
    present = api.list_repo_files(repo_id, repo_type="dataset")
    if foreign := [n for n in present if n.endswith(_OF_A_VERSION) and n not in files]:
        raise ValueError(
            f"{repo_id} holds another dataset ({', '.join(foreign[:3])}). Nothing was uploaded: "
            "choose another repository, or delete these files there."
        )
    return _commit_files(api, repo_id, "dataset", files, message)

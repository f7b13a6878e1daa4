"""Upload models and activation datasets to the Hub.

Tokens stay with huggingface_hub (`hf auth login`, or HF_TOKEN). An upload that is interrupted goes
on when the same command is run again.
"""

from pathlib import Path

from huggingface_hub import HfApi

from ..activations.format import verify_activations
from .model_card import COMMIT

# the files of a repository
MODEL_FILES = ["configuration_raptor.py", "modeling_raptor*.py", "config.json", "*.safetensors"]
MODEL_FILES += ["*.safetensors.index.json", "preprocessor_config.json", "training.json"]
MODEL_FILES += ["export.json", "onnx/*.onnx", ".eval_results/*.yaml"]
ACTIVATION_FILES = ["README.md", "*.arrow", "manifest.json", "dataset_info.json", "state.json"]
ACTIVATION_FILES += ["preprocessor_config.json"]
# a new version replaces the weights or shards of the one before
_REPLACED = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.arrow", *MODEL_FILES[-3:]]


def publish_model(model_dir: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Upload a saved model and its card; return the commit that the card tells users to trust.

    The first commit holds the model, byte for byte as it was judged. The second one holds the card
    that `write_model_card` made, whose snippet names the first.

    A ValueError says that the repository is public, where a private one was asked for.
    """
    commit = upload_files(model_dir, repo_id, MODEL_FILES, private=private)
    card = (Path(model_dir) / "README.md").read_text(encoding="utf-8")
    HfApi().upload_file(
        repo_id=repo_id,
        path_or_fileobj=card.replace(COMMIT, commit).encode(),
        path_in_repo="README.md",
        commit_message="The card names the revision to load",
    )
    return commit


def publish_activations(path: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Verify and upload an activation dataset; return its commit, or a ValueError of damage."""
    problems = verify_activations(path)
    if problems:
        raise ValueError("\n".join(problems.values()))
    return upload_files(path, repo_id, ACTIVATION_FILES, repo_type="dataset", private=private)


def upload_files(
    folder: str | Path,
    repo_id: str,
    patterns: list[str],
    *,
    repo_type: str = "model",
    private: bool = False,
) -> str:
    """Upload the files of a folder that match a pattern; return the commit.

    Weights and shards of an earlier version are deleted. Errors as `publish_model`.
    """
    # a repository that exists keeps its visibility
    api = HfApi()
    sdk = "static" if repo_type == "space" else None
    api.create_repo(
        repo_id, repo_type=repo_type, space_sdk=sdk, private=private or None, exist_ok=True
    )
    if private and not api.repo_info(repo_id, repo_type=repo_type).private:
        raise ValueError(
            f"{repo_id} exists and is public; nothing was uploaded. Make it private in its "
            "settings, choose another --repo_id, or leave out --private."
        )
    # one commit, without logs, checkpoints and run.json; patterns of the Hub would look below them
    files = [file for pattern in patterns for file in Path(folder).glob(pattern)]
    commit = api.upload_folder(
        repo_id=repo_id,
        repo_type=repo_type,
        folder_path=folder,
        allow_patterns=[file.relative_to(folder).as_posix() for file in files],
        delete_patterns=_REPLACED,
    )
    return commit.oid

"""Files of weights that strangers made: what is read of them, and what is refused.

Nothing but tensors is ever loaded, so nothing in such a file is run.
"""

import hashlib
import json
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

# what torch.load raises for a file that is broken or no torch file
BROKEN = (EOFError, RuntimeError, LookupError, AttributeError, TypeError, ValueError)
# what torch.load raises for a file that is broken, of another kind, or holds more than tensors
_UNREADABLE = (*BROKEN, pickle.UnpicklingError, SafetensorError)


def check_weight_files(
    name_or_path: str, config: PreTrainedConfig, revision: str | None = None
) -> None:
    """Refuse a model whose index of shards or configuration names a pickle, or a foreign folder.

    `use_safetensors=True` alone looks for an index, and follows it wherever it leads.

    Raises:
        ValueError: it does; the files are named.
    """
    index = cached_file(
        name_or_path,
        SAFE_WEIGHTS_INDEX_NAME,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
    )
    files = {getattr(config, "transformers_weights", None)} - {None}
    if index:
        files |= set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    foreign = [f for f in sorted(files) if not f.endswith(".safetensors") or Path(f).name != f]
    if foreign:
        raise ValueError(
            f"The weights of {name_or_path} must lie in safetensors beside its configuration; it "
            f"names {foreign[:3]}, which are not opened."
        )


def weights_digest(model: PreTrainedModel) -> str:
    """Return SHA-256 of a model's weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_head_file(path: Path) -> dict[str, torch.Tensor]:
    """Read `weight` and `bias` of a file; nothing but tensors is ever loaded from it."""
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        # not torch's own words: for a file that holds more than tensors they advise to run it
        raise ValueError(
            f"{path}: a linear head is a file of the tensors 'weight' and 'bias'; this one is "
            "broken, of another kind, or holds more than tensors. It was refused, and nothing in "
            "it was run."
        ) from error
    if not isinstance(weights, dict) or set(weights) != {"weight", "bias"}:
        contents = sorted(map(str, weights))[:5] if isinstance(weights, dict) else type(weights)
        raise ValueError(f"{path}: a linear head holds 'weight' and 'bias'; found {contents}.")
    if not all(isinstance(weight, torch.Tensor) for weight in weights.values()):
        contents = {name: type(weight).__name__ for name, weight in weights.items()}
        raise ValueError(f"{path}: 'weight' and 'bias' must be tensors; got {contents}.")
    return weights


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a `.safetensors` file; a ValueError says that it is broken."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error

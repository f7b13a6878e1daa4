"""Read files of weights from unknown sources: tensors only, so nothing in a file is run."""

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

# errors of the readers for a file that is damaged or of another kind
_DAMAGED = (EOFError, RuntimeError, LookupError, AttributeError, TypeError, ValueError)
_DAMAGED += (SafetensorError, zipfile.BadZipFile)


def check_weight_files(name_or_path: str, config: PreTrainedConfig) -> None:
    """Refuse a model with weights in a pickle, or outside its own folder, with a ValueError.

    `use_safetensors=True` alone follows the index of shards wherever it leads.
    """
    # the configuration and the index of shards name files of weights
    index = cached_file(
        name_or_path,
        SAFE_WEIGHTS_INDEX_NAME,
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
        digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_weights(path: str | Path, stubs: Sequence = ()):
    """Load a `.safetensors` or torch file without running anything in it.

    Args:
        stubs: stand-ins for the classes that a pickle may name, as (class, name).

    Raises:
        ValueError: the file is damaged, of another kind, or names another class.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # torch does not compare the checksums of its files
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"the checksum of {damaged} is another one")
        with torch.serialization.safe_globals(list(stubs)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message advises to load the file unsafely
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        contents = f"names {named[1]}" if named else "holds more than tensors and plain modules"
        raise ValueError(f"{path} {contents}. It was refused, and nothing in it was run.") from None
    except _DAMAGED as error:
        raise ValueError(f"{path} is damaged, or not a file of weights: {error}") from error

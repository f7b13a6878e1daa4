"""The command line of a program, or a recipe file, as dataclasses of arguments.

A program has several dataclasses, one a subject. Flags, recipes and `run.json` are flat. The type
of an argument may say more of it: `Watching[int]` changes how a run is watched or stored, never
what it computes; `OnCard[int]` is told by model cards.
"""

import dataclasses
import difflib
import sys
from pathlib import Path
from typing import Annotated, TypeVar, get_type_hints

import yaml

T = TypeVar("T")
Watching = Annotated[T, "watching"]
OnCard = Annotated[T, "on_card"]


def parse_arguments(*parts: type, defaults: dict | None = None) -> tuple:
    """Read `program [recipe.yaml] [--flag value …]` into an instance of every dataclass.

    A recipe holds flags by name; flags on the command line win over it.

    Args:
        parts: dataclasses that have no field in common.
        defaults: of this program, where they differ from those of the dataclasses.

    Raises:
        ValueError: a recipe that is not a mapping, or with a key that the program does not know.
    """
    from transformers import HfArgumentParser

    argv = sys.argv[1:]
    if argv and argv[0].endswith((".yaml", ".yml")):
        known = [field.name for part in parts for field in dataclasses.fields(part)]
        flags = []
        for name, value in _read_recipe(argv[0], known).items():
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        argv = flags + argv[1:]
    parser = HfArgumentParser(parts)
    parser.set_defaults(**defaults or {})
    return parser.parse_args_into_dataclasses(argv)


def _read_recipe(path: str | Path, known: list[str]) -> dict:
    """Read a recipe file; errors as `parse_arguments`."""
    recipe = yaml.safe_load(Path(path).read_text()) or {}
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: a recipe holds lines like `steps: 100`; got {recipe!r}.")
    for key in recipe:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, cutoff=0.0)[0]
            raise ValueError(
                f"{path}: {Path(sys.argv[0]).name} has no argument {key!r}; "
                f"the nearest one is {near!r}."
            )
    return recipe


def build_arguments(values: dict, *parts: type) -> tuple:
    """Make an instance of every dataclass from one flat dict, as `parse_arguments` from flags.

    Raises:
        TypeError: a name that no dataclass has.
    """
    names = [{field.name for field in dataclasses.fields(part)} for part in parts]
    if unknown := set(values) - set().union(*names):
        raise TypeError(f"No argument is called {', '.join(sorted(unknown))}.")
    return tuple(
        part(**{name: value for name, value in values.items() if name in own})
        for part, own in zip(parts, names, strict=True)
    )


def all_values(*parts) -> dict:
    """Return the arguments of several instances as one flat dict."""
    return {name: value for part in parts for name, value in dataclasses.asdict(part).items()}


def marked_names(mark: type, *parts) -> list[str]:
    """Return the names of the arguments that are marked: `marked_names(Watching, LoopArguments)`.

    Args:
        parts: dataclasses, or instances of them.
    """
    names = []
    for part in parts:
        kind = part if isinstance(part, type) else type(part)
        for name, hint in get_type_hints(kind, include_extras=True).items():
            if mark.__metadata__[0] in getattr(hint, "__metadata__", ()):
                names.append(name)
    return names

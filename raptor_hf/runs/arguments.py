"""The command line of a program, or a recipe file, as dataclasses of arguments.

A program has several dataclasses, one a subject. Flags, recipes and `run.json` are flat. The type
of an argument may say more of it: `Watching[int]` changes how a run is watched or stored, never
what it computes; `OnCard[int]` is told by model cards. `Positive`, `NonNegative` and `Share` say
which numbers there are: a dataclass that is `Checked` refuses others as it is made.
"""

import dataclasses
import difflib
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, TypeVar, get_args, get_type_hints

import yaml

T = TypeVar("T")
Watching = Annotated[T, "watching"]
OnCard = Annotated[T, "on_card"]
Positive = Annotated[T, "positive"]
NonNegative = Annotated[T, "non_negative"]
Share = Annotated[T, "share"]
_RANGES = {
    "positive": (lambda number: 0 < number < math.inf, "must be a number > 0"),
    "non_negative": (lambda number: 0 <= number < math.inf, "must be a number ≥ 0"),
    "share": (lambda number: 0 <= number <= 1, "must lie in [0, 1]"),
}


class Checked:
    """A dataclass of arguments whose numbers lie in the ranges that their types say.

    Raises:
        ValueError: as it is made, for a number out of range; of a list, for each of its numbers.
    """

    def __post_init__(self):
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            numbers = value if isinstance(value, list | tuple) else [value]
            for mark in _marks(hint):
                allowed, rule = _RANGES.get(mark, (None, None))
                if allowed and not all(allowed(number) for number in numbers if number is not None):
                    raise ValueError(f"--{name} {rule}; got {_shown(value)}.")


def _marks(hint) -> Iterator[str]:
    """Yield the marks of a type, at any depth: those of `list[Positive[int]] | None` too."""
    yield from getattr(hint, "__metadata__", ())
    for inner in get_args(hint):
        yield from _marks(inner)


def _shown(value) -> str:
    """Return a value as one would type it."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def parse_arguments(*parts: type, defaults: dict | None = None) -> tuple:
    """Read `program [recipe.yaml] [--flag value …]` into an instance of every dataclass.

    A recipe holds flags by name; flags on the command line win over it. An empty value, as in
    `blocks:` or `blocks: null`, is the default.

    Args:
        parts: dataclasses that have no field in common.
        defaults: of this program, where they differ from those of the dataclasses.

    Raises:
        ValueError: a recipe that is not a mapping, or with a key that the program does not know;
            a number out of range.
    """
    from transformers import HfArgumentParser

    argv = sys.argv[1:]
    if argv and argv[0].endswith((".yaml", ".yml")):
        known = [field.name for part in parts for field in dataclasses.fields(part)]
        flags = []
        for name, value in _read_recipe(argv[0], known).items():
            if value in (None, "", [], [None]):
                continue
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        argv = flags + argv[1:]
    parser = HfArgumentParser(parts)
    parser.set_defaults(**defaults or {})
    return parser.parse_args_into_dataclasses(argv)


def _read_recipe(path: str | Path, known: list[str]) -> dict:
    """Read a recipe file; errors as `parse_arguments`."""
    recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: a recipe holds lines like `steps: 100`; got {recipe!r}.")
    for key in recipe:
        items = recipe[key] if isinstance(recipe[key], list) else [recipe[key]]
        if any(isinstance(item, dict | list) for item in items) or (None in items and items[1:]):
            raise ValueError(f"{path}: {key} takes a value or a list of values; got {items}.")
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


def named_folders(flag: str, values: Iterable[str], *, reserved: Iterable[str] = ()) -> dict:
    """Return the folder or Hub id of every model by its name.

    Args:
        flag: where the values come from, for errors.
        values: `NAME=FOLDER`, or a folder or Hub id, whose last part is the name.
        reserved: names that models can't have.

    Raises:
        ValueError: a name that is no file name, is reserved, or stands twice.
    """
    folders = {}
    for value in values:
        name, equals, folder = value.partition("=")
        if not equals or Path(value).is_dir():  # a folder may be called lr=0.1
            name, folder = Path(value).resolve().name, value
        if not folder or not name or name.startswith(".") or {"/", "\\"} & set(name):
            raise ValueError(
                f"{flag}: there is no folder {value!r}. Give a folder or Hub id, or NAME=FOLDER, "
                "where NAME holds no / and does not begin with a dot."
            )
        if name in folders or name in reserved:
            taken = "that of another model" if name in folders else "reserved"
            raise ValueError(f"{flag} {value}: the name {name!r} is {taken}. Give NAME=FOLDER.")
        folders[name] = folder
    return folders


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

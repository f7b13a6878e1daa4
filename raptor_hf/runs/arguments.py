"""The command line of a program, or a recipe file, as dataclasses of arguments.

A program has several dataclasses, one a subject. Flags, recipes and `run.json` are flat.
"""

import dataclasses
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from .files import read_text


def parse_arguments(
    *parts: type, argv: list[str] | None = None, defaults: dict | None = None
) -> tuple:
    """Read `program [recipe.yaml] [--flag value …]` into an instance of every dataclass.

    A recipe holds flags by name; flags on the command line win over it. An empty value, as in
    `blocks:`, is the default; `[]` is an empty list.

    Args:
        parts: dataclasses that have no field in common.
        argv: the words after the program's name; default: those of the command line.
        defaults: of this program, where they differ from those of the dataclasses.

    Raises:
        ValueError: a recipe that is no mapping, an unknown flag, or a value that is refused.
    """
    # a recipe becomes the first flags
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].endswith((".yaml", ".yml")):
        flags = []
        for name, value in _read_recipe(words.pop(0)).items():
            if value is None or value == "":
                continue
            values = value if isinstance(value, list) else [value]
            flags += [f"--{name}", *map(str, values)]
        words = flags + words

    # transformers' parser, where a list may be empty
    parser = HfArgumentParser(parts, allow_abbrev=False)
    for action in parser._actions:
        if action.nargs == "+":
            action.nargs = "*"
    parser.set_defaults(**defaults or {})
    *values, rest = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if rest:
        raise ValueError(f"Unknown arguments: {' '.join(rest)}. --help lists those that there are.")
    return tuple(values)


def _read_recipe(path: str) -> dict:
    """Read a recipe file; errors as `parse_arguments`."""
    try:
        recipe = yaml.safe_load(read_text(path)) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: a recipe holds lines like `steps: 100`; got {recipe!r}.")
    return recipe


def all_values(*parts) -> dict:
    """Return the arguments of several instances as one flat dict."""
    values = {}
    for part in parts:
        values |= dataclasses.asdict(part)
    return values


def check_positive(arguments, *names: str, allow_zero: bool = False) -> None:
    """Refuse arguments that are not finite numbers > 0 (of a list: each); None is allowed.

    Raises:
        ValueError: names the argument and its value.
    """
    for name in names:
        value = getattr(arguments, name)
        for number in value if isinstance(value, list) else [value]:
            if number is None or 0 < number < math.inf or (allow_zero and number == 0):
                continue
            least = "≥ 0" if allow_zero else "> 0"
            raise ValueError(f"--{name} must be a number {least}; got {number}.")


def check_not_negative(arguments, *names: str) -> None:
    """Refuse arguments that are not finite numbers ≥ 0, as `check_positive`."""
    check_positive(arguments, *names, allow_zero=True)


def named_folders(flag: str, values: Iterable[str], *, reserved: Iterable[str] = ()) -> dict:
    """Return the folder or Hub id of every model by its name.

    Args:
        flag: where the values come from, for errors.
        values: `NAME=FOLDER`, or a folder or Hub id: its last part is the name.
        reserved: names that models can't have.

    Raises:
        ValueError: a name that is no file name, or is taken.
    """
    folders = {}
    for value in values:
        name, equals, folder = value.partition("=")
        if not equals or Path(value).is_dir():  # a folder may be called lr=0.1
            name, folder = Path(value).absolute().name, value
        if not folder or not re.fullmatch(r"[^./\\][^/\\]*", name):
            raise ValueError(f"{flag}: give a folder or Hub id, or NAME=FOLDER; got {value!r}.")
        if name in {*folders, *reserved}:
            raise ValueError(f"{flag} {value}: the name {name!r} is taken. Give NAME=FOLDER.")
        folders[name] = folder
    return folders

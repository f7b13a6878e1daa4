"""The command line and recipes of a program."""

import dataclasses
import difflib
import sys
from pathlib import Path

import yaml
from transformers import HfArgumentParser


def parse_arguments(arguments_class: type):
    """The command line as an instance of a dataclass: `program [recipe.yaml] [--flag value …]`.

    A recipe holds flags by name; flags on the command line win over it.

    Raises:
        ValueError: a recipe that is not a mapping, or with a key that the program does not know.
    """
    argv = sys.argv[1:]
    if argv and argv[0].endswith((".yaml", ".yml")):
        recipe = read_recipe(argv[0], [field.name for field in dataclasses.fields(arguments_class)])
        flags = []
        for name, value in recipe.items():
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        argv = flags + argv[1:]
    return HfArgumentParser(arguments_class).parse_args_into_dataclasses(argv)[0]


def read_recipe(path: str | Path, known: list[str]) -> dict:
    """A recipe file as a dict; errors as `parse_arguments`."""
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

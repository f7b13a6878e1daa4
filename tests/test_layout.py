"""The rooms of the package stand on levels, and each imports only from lower ones."""

import ast
import pkgutil
import re
import sys

import pytest

import raptor_hf
from tests.pages import read
from tests.programs import ROOT

# the table of docs/architecture.md: `| 3 | `activations` | … |`, several rooms a row
ROWS = re.findall(r"^\| (\d) \| (`.*?`) \|", read("docs/architecture.md"), re.MULTILINE)
LEVEL = {room: int(level) for level, names in ROWS for room in re.findall(r"`(\w+)`", names)}
# what the files that travel to the Hub may import
TRAVELS = {
    "configuration_raptor": {"torch", "transformers"},
    "modeling_raptor": {"torch", "transformers", "configuration_raptor", "modeling_raptor_heads"},
    "modeling_raptor_heads": {"torch", "transformers", "configuration_raptor", "modeling_raptor"},
}
CLIENTS = ("training", "evaluation", "model_cards", "docs")


def imports_of(path, root):
    """The modules that a file imports, anywhere in it, by their absolute names."""
    package = path.relative_to(root).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            yield ".".join([*base, *filter(None, [node.module])])
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def upward_imports(root):
    """Imports between rooms that do not lead downwards, as `room -> room (module)`."""
    found = []
    for path in sorted((root / "raptor_hf").rglob("*.py")):
        own = path.relative_to(root / "raptor_hf").with_suffix("").parts
        if own == ("__init__",):  # the front door
            continue
        for name in imports_of(path, root):
            package, _, rest = name.partition(".")
            room = rest.split(".")[0]
            # the model names its heads as it is saved: transformers copies both files
            together = {own[0], room} == {"modeling_raptor", "modeling_raptor_heads"}
            upwards = package == "raptor_hf" and room != own[0] and LEVEL[room] >= LEVEL[own[0]]
            if upwards and not together:
                found.append(f"{own[0]} -> {room} ({'.'.join(own)})")
            if package in (*CLIENTS, "tests"):
                found.append(f"{own[0]} -> {name} ({'.'.join(own)})")
    return found


def private_imports(root):
    """Names with an underscore that clients import from the library, as `file: name`."""
    found = []
    for path in sorted(path for room in CLIENTS for path in (root / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("raptor_hf"):
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
                found += [f"{path.name}: {name}" for name in names if name.startswith("_")]
    return found


def test_every_room_has_a_level():
    assert {module.name for module in pkgutil.iter_modules(raptor_hf.__path__)} == set(LEVEL)


def test_rooms_import_from_lower_levels_only():
    assert upward_imports(ROOT) == []


def test_clients_use_public_names_only():
    assert private_imports(ROOT) == []


@pytest.mark.parametrize("name", TRAVELS)
def test_files_that_travel_to_the_hub_need_nothing_else(name):
    for module in imports_of(ROOT / "raptor_hf" / f"{name}.py", ROOT):
        first, last = module.split(".")[0], module.split(".")[-1]
        needed = last if first == "raptor_hf" else first
        assert needed in TRAVELS[name] | set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("folder", "code", "find", "expected"),
    [
        ("raptor_hf/runs", "from ..loop import fit", upward_imports, "runs -> loop (runs.files)"),
        ("raptor_hf/runs", "import training.x", upward_imports, "runs -> training.x (runs.files)"),
        ("evaluation", "from raptor_hf.loop.fit import _a", private_imports, "files.py: _a"),
    ],
)
def test_a_wrong_import_is_seen(tmp_path, folder, code, find, expected):
    """Show that the tests above can fail."""
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "files.py").write_text(code)
    assert find(tmp_path) == [expected]

"""The rooms of the package stand on levels, and each imports only from lower ones."""

import ast
import importlib
import pkgutil
import re
import sys

import raptor_hf
from tests.pages import read
from tests.programs import ROOT

# the table of docs/architecture.md: `| 3 | `activations` | … |`, several rooms a row
ROWS = re.findall(r"^\| (\d) \| (`.*?`) \|", read("docs/architecture.md"), re.MULTILINE)
LEVEL = {room: int(level) for level, names in ROWS for room in re.findall(r"`(\w+)`", names)}
TRAVELS = {
    "configuration_raptor": {"torch", "transformers"},
}
CLIENTS = ("training", "evaluation", "model_cards", "docs")
TRAVELS["modeling_raptor"] = TRAVELS["configuration_raptor"] | {
    "configuration_raptor",
    "modeling_raptor_heads",
}
TRAVELS["modeling_raptor_heads"] = TRAVELS["modeling_raptor"] | {"modeling_raptor"}
PROGRAMS = sorted(
    path
    for folder in ("training", "evaluation", "model_cards")
    for path in (ROOT / folder).rglob("*.py")
)


def imports_of(path, root=ROOT):
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
        if own == ("__init__",) or own[0] in TRAVELS:  # the front door, and see below
            continue
        for name in imports_of(path, root):
            package, _, rest = name.partition(".")
            room = rest.split(".")[0]
            if package == "raptor_hf" and room != own[0] and LEVEL[room] >= LEVEL[own[0]]:
                found.append(f"{own[0]} -> {room} ({'.'.join(own)})")
    return found


def test_every_room_has_a_level():
    rooms = {module.name for module in pkgutil.iter_modules(raptor_hf.__path__)}
    assert rooms == set(LEVEL)


def test_rooms_import_from_lower_levels_only():
    assert upward_imports(ROOT) == []


def test_programs_are_not_imported_by_the_library():
    programs = {"training", "evaluation", "model_cards", "tests"}
    for path in (ROOT / "raptor_hf").rglob("*.py"):
        assert not {name.split(".")[0] for name in imports_of(path)} & programs, path


def test_what_travels_to_the_hub_needs_nothing_else():
    for name, allowed in TRAVELS.items():
        imported = {n.split(".")[-1] if n.startswith("raptor_hf") else n.split(".")[0]
                    for n in imports_of(ROOT / "raptor_hf" / f"{name}.py")}  # fmt: skip
        assert imported - set(sys.stdlib_module_names) <= allowed


def test_folders_and_faces_are_small():
    for folder in {path.parent for path in (ROOT / "raptor_hf").rglob("*.py")}:
        modules = [path for path in folder.glob("*.py") if not path.name.startswith("__")]
        assert len(modules) <= 10, folder
    for name in LEVEL:
        face = importlib.import_module(f"raptor_hf.{name}")
        if hasattr(face, "__path__"):
            assert len(getattr(face, "__all__", [])) <= 10, name
            for handed_on in getattr(face, "__all__", []):
                assert getattr(face, handed_on) is not None


def test_what_programs_ask_a_face_for_is_there():
    for path in PROGRAMS:
        faces = {}
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "raptor_hf":
                faces |= {alias.asname or alias.name: alias.name for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                face = faces.get(node.value.id)
                if face:
                    module = importlib.import_module(f"raptor_hf.{face}")
                    assert node.attr in dir(module), f"{path.name}: {face}.{node.attr}"


def private_imports(root):
    """Names with an underscore that clients import from the library, as `file: name`."""
    found = []
    for path in sorted(path for room in CLIENTS for path in (root / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("raptor_hf"):
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
                found += [f"{path.name}: {name}" for name in names if name.startswith("_")]
    return found


def test_clients_use_public_names_only():
    assert private_imports(ROOT) == []


def test_a_private_import_is_seen(tmp_path):
    """Show that the test of the border can fail."""
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "study.py").write_text("from raptor_hf.loop.fit import _is_due\n")
    assert private_imports(tmp_path) == ["study.py: _is_due"]


def test_an_import_upwards_is_seen(tmp_path):
    """Show that the test of the levels can fail."""
    (tmp_path / "raptor_hf" / "runs").mkdir(parents=True)
    (tmp_path / "raptor_hf" / "runs" / "files.py").write_text("from ..loop import fit\n")
    assert upward_imports(tmp_path) == ["runs -> loop (runs.files)"]

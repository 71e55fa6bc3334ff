"""The rooms of the package: arrows run downwards only, and nothing imports in a circle, lazily or for types alone."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import tts_align

PACKAGE = Path(tts_align.__file__).parent

# A room may import from the floors below it and from itself; rooms of one floor do not know of each other.
FLOORS = [
    {"batch", "logprobs", "gumbel", "utils"},
    {"models"},
    {"objectives", "data"},
    {"evaluation"},
    {"training"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
FOLDERS = sorted({path.parent for path in FILES} | {PACKAGE})


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of every module of the package that a file imports, lazily or for its types alone."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if node.module == "tts_align":  # a public name stands for the module that it comes from
                    name = tts_align.PUBLIC.get(alias.name, name)
                yield node.lineno, name if _file(name) else str(node.module)


def _file(module: str) -> Path | None:
    """File of a module of the package; ``None`` for anything else."""
    package, *names = module.split(".")
    if package != "tts_align" or not names:
        return None
    path = PACKAGE.joinpath(*names)
    return next((one for one in (path.with_suffix(".py"), path / "__init__.py") if one.is_file()), None)


def _own_imports(path: Path) -> Iterator[tuple[int, Path]]:
    for line, module in _imports(path):
        found = _file(module)
        if found is not None:
            yield line, found


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_every_file_stands_in_a_room() -> None:
    assert {_room(path) for path in FILES} == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_run_downwards(path: Path) -> None:
    for line, target in _own_imports(path):
        own, other = _room(path), _room(target)
        assert own == other or FLOOR[other] < FLOOR[own], f"{path}:{line}: {own} must not import from {other}"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_circle_between_the_files_and_folders_of(folder: Path) -> None:
    """Each folder is one room for its neighbours: that its files can be ordered is not enough."""
    arrows: dict[str, set[str]] = {}
    for path in FILES:
        if folder not in path.parents:
            continue
        own = path.relative_to(folder).parts[0]
        below = {target.relative_to(folder).parts[0] for _, target in _own_imports(path) if folder in target.parents}
        arrows.setdefault(own, set()).update(below - {own, "__init__.py"})
    try:
        tuple(graphlib.TopologicalSorter(arrows).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"{folder.relative_to(PACKAGE)}: " + " -> ".join(error.args[1]))


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("objectives", ("lightning", "transformers", "peft")),
        ("models", ("lightning",)),
        ("evaluation/metrics", ("tts_align.models", "lightning")),
        ("evaluation/judges", ("tts_align.models.policy", "lightning")),
    ],
)
def test_rooms_without_a_framework(room: str, forbidden: tuple[str, ...]) -> None:
    for path in (PACKAGE / room).rglob("*.py"):
        for line, module in _imports(path):
            assert not f"{module}.".startswith(tuple(f"{name}." for name in forbidden)), f"{path}:{line}: {module}"


def test_objectives_know_models_by_their_interfaces() -> None:
    for path in (PACKAGE / "objectives").rglob("*.py"):
        for line, module in _imports(path):
            names = module.split(".")
            assert names[:2] != ["tts_align", "models"] or names[2] == "base", f"{path}:{line}: {module}"


def test_no_file_is_long() -> None:
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in FILES}
    assert {path: length for path, length in lengths.items() if length > 350} == {}
    assert lengths[PACKAGE / "training" / "module.py"] <= 250


def test_what_help_reads_first_imports_nothing_heavy() -> None:
    """``tts-align --help`` reads only these files."""
    heavy = {"torch", "lightning", "transformers", "jsonargparse", "numpy", "matplotlib"}
    for name in ("__init__.py", "__main__.py", "cli/__init__.py", "cli/entry.py", "utils/__init__.py"):
        tree = ast.parse((PACKAGE / name).read_text("utf-8"))
        for node in tree.body:  # what runs on import, not what functions import
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not heavy & {module.split(".")[0] for module in names}, f"{name}:{node.lineno}"

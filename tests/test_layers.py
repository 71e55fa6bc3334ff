"""Each part of the package imports only from the parts above it in the design's list."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tts_align

PACKAGE = Path(tts_align.__file__).parent

# A layer may import from the layers above it and from itself; a base class may stand above the rest of its folder.
LAYERS = [
    {"files", "assets", "audio"},
    {"batch", "logprobs", "gumbel", "rewards", "handover"},
    {"models"},
    {"objectives", "judges.base"},
    {"metrics"},
    {"judges"},
    {"data"},
    {
        "module",
        "verbs",
        "cache",
        "contrast",
        "evaluation",
        "callbacks",
        "messages",
        "report",
        "table",
        "reward_fit",
        "stage_fit",
        "reward_evaluation",
    },
    {"recipe", "run", "stages", "trainer"},
    {"cli", "__main__"},
]
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def _part(names: tuple[str, ...]) -> str:
    """The entry of LAYERS that holds a module, given its path inside the package; empty for the package itself."""
    dotted = ".".join(names[:2])
    return dotted if dotted in RANK else ".".join(names[:1])


def _own(path: Path) -> str:
    return _part(path.relative_to(PACKAGE).with_suffix("").parts)


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of every module that is imported to be used, lazily or not."""
    tree = ast.parse(path.read_text("utf-8"))
    only_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in only_types:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.lineno, node.module or ""
            if node.module == "tts_align":
                yield from ((node.lineno, f"tts_align.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_upwards(path: Path) -> None:
    own = _own(path)
    assert own in RANK, f"{own} has no layer: add it to LAYERS"
    for line, module in _imports(path):
        package, *names = module.split(".")
        part = _part(tuple(names)) if package == "tts_align" else ""
        if part in RANK:
            assert RANK[part] <= RANK[own], f"{path}:{line}: {own} must not import {module}"


@pytest.mark.parametrize(
    ("part", "forbidden"),
    [
        ("objectives", ("tts_align.models", "lightning", "transformers", "peft")),
        ("models", ("tts_align.objectives", "lightning")),
        ("metrics", ("tts_align.models", "tts_align.objectives", "lightning")),
        ("judges", ("tts_align.models.qwen2", "tts_align.objectives", "lightning")),
    ],
)
def test_parts_do_not_know_of_each_other(part: str, forbidden: tuple[str, ...]) -> None:
    for path in (PACKAGE / part).rglob("*.py"):
        for line, module in _imports(path):
            assert not f"{module}.".startswith(tuple(f"{name}." for name in forbidden)), f"{path}:{line}: {module}"


def test_the_layers_of_the_front_import_nothing_heavy_at_once() -> None:
    """``tts-align --help`` reads only these files."""
    heavy = {"torch", "lightning", "transformers", "jsonargparse", "numpy", "matplotlib"}
    for name in ("__init__.py", "__main__.py", "cli.py"):
        tree = ast.parse((PACKAGE / name).read_text("utf-8"))
        for node in tree.body:  # what runs on import, not what functions import
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not heavy & {module.split(".")[0] for module in names}, f"{name}:{node.lineno}"

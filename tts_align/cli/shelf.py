# SPDX-License-Identifier: Apache-2.0
"""The recipes that ship with the package: found by name from any folder, listed, and copied."""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tts_align.cli.errors import did_you_mean, fail, note

CONFIG_FLAGS = ("--config", "-c")
PACKAGE = Path(__file__).parents[1]
FOLDER = "recipes"
ROWS = (".jsonl", ".parquet")
"""Endings of manifests."""


def shelf() -> Path:
    """Where the recipes lie: inside an installed package, beside the package in a checkout."""
    inside = PACKAGE / FOLDER
    return inside if inside.is_dir() else PACKAGE.parent / FOLDER


@cache
def names() -> dict[str, Path]:
    """Name of each packaged recipe, such as ``tkto`` or ``strategy/ddp``, with its file; overlays come last."""
    files = sorted(shelf().rglob("*.yaml"), key=lambda path: (len(path.relative_to(shelf()).parts), str(path)))
    return {path.relative_to(shelf()).with_suffix("").as_posix(): path for path in files}


def summary(path: Path) -> tuple[str, bool]:
    """First sentence, up to a colon, of the comment that a recipe opens with, and whether that calls it an overlay."""
    lines = []
    for line in path.read_text("utf-8").splitlines():
        if not line.startswith("# "):
            break
        lines.append(line[2:])
    text, mark, _ = re.sub("an overlay:", "An overlay:", " ".join(lines)).partition("An overlay:")
    return text.partition("  tts-align ")[0].strip().rstrip(".;").split(". ")[0].split(": ")[0], bool(mark)


def overlays() -> list[str]:
    """Names of the packaged recipes that follow another recipe."""
    return [name for name, path in names().items() if summary(path)[1]]


def config_places(args: Sequence[str]) -> list[int]:
    """Places on a command line where recipes are named."""
    flagged = tuple(f"{flag}=" for flag in CONFIG_FLAGS)
    after = [at + 1 for at, arg in enumerate(args[:-1]) if arg in CONFIG_FLAGS]
    return sorted(after + [at for at, arg in enumerate(args) if arg.startswith(flagged)])


def named_at(args: Sequence[str], at: int) -> str:
    """What a command line names as a recipe at one of its :func:`config_places`."""
    return args[at].partition("=")[2] if args[at].startswith("-") else args[at]


def find(named: str) -> Path | None:
    """File of a packaged recipe by name: ``tkto``, ``tkto.yaml``, ``recipes/tkto.yaml``; ``None`` if there is none."""
    return names().get(named.removeprefix(f"{FOLDER}/").removesuffix(".yaml"))


def find_recipes(args: Sequence[str]) -> list[str]:
    """Write out the file of every recipe that is named on a command line; a file of that name comes before ours."""
    found = list(args)
    for at in config_places(args):
        named = named_at(args, at)
        if named.endswith(ROWS) and os.path.isfile(named):
            fail(f"{named} holds rows, not a recipe: pass it as --data.manifest, after a recipe such as --config tkto")
        if (os.path.exists(named) and not os.path.isdir(named)) or "\n" in named or named.startswith("{"):
            continue  # a file, or the text of a recipe
        if os.path.isfile(f"{named}.yaml"):
            note(f"recipe: {named} is the file {named}.yaml, not a packaged recipe")
            found[at] = f"{args[at]}.yaml"
            continue
        path = find(named)
        if path is None:
            fail(_unknown(named))
        note(f"recipe: {named} is the packaged {path}")
        found[at] = args[at].removesuffix(named) + str(path)
    return found


def _unknown(named: str) -> str:
    known = list(names())
    tail = named.removeprefix(f"{FOLDER}/").removesuffix(".yaml")
    why = "there is no such file"
    if os.path.isdir(named):
        inside = [path.as_posix() for path in sorted(Path(named).glob("*.yaml"))]
        why = f"it is a folder, write --config {' or '.join(inside)}" if inside else "it is a folder without a recipe"
    return (
        f"no recipe {named!r}: {why}{did_you_mean(tail, known)}\n"
        f"packaged recipes: {', '.join(name for name in known if name not in overlays())}\n"
        f"packaged overlays: {', '.join(overlays())}"
    )


def _list() -> None:
    """Print the packaged recipes with a line each, overlays last."""
    width, later = max(map(len, names())), overlays()
    for title, listed in (("recipes:", False), ("overlays, each named after a recipe:", True)):
        print(title)
        for name, path in names().items():
            if (name in later) is listed:
                print(f"  {name:{width}}  {summary(path)[0]}")
        print()
    print("run one:       tts-align fit --config tkto --config lora\ncopy them all: tts-align recipes --copy recipes")


def recipes(args: Sequence[str]) -> None:
    """List the packaged recipes, or copy them.

    Args:
        args: the command line after it.
    """
    parser = argparse.ArgumentParser("tts-align recipes", add_help=False)
    parser.add_argument("--copy", metavar="DIR", type=Path, help="folder to copy the recipes to; files there stay")
    given, words = parser.parse_known_args(args)
    if words:
        use = f"tts-align fit --config {words[0]} trains with it, " if find(words[0]) else ""
        fail(f"recipes takes --copy DIR only, got {' '.join(words)}: {use}tts-align recipes --copy DIR copies them all")
    target = given.copy
    if target is None:
        _list()
        return
    new = {path: target / path.relative_to(shelf()) for path in names().values()}
    if taken := [str(path) for path in new.values() if path.exists()]:
        fail(f"{len(taken)} files are there already, {taken[0]} first: choose another folder; nothing was copied")
    for path, copy in new.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    print(f"{len(new)} recipes copied to {target}")

# SPDX-License-Identifier: Apache-2.0
"""Directories that a recipe leaves to be filled in, and names of hubs where a directory is wanted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tts_align.cli.errors import RecipeError

FILL_IN = {"DIR": "a model directory", "FILE": "a file of rows"}
"""What stands in a recipe for a path that only the user knows."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WITHOUT_ROWS = ("sample", "judge")
"""Commands that read no rows."""


def check_places(config: Mapping[str, Any], command: str) -> None:
    """Refuse a recipe with a path that is still to be filled in, a hub's identifier for one, or one that is written to.

    Args:
        config: the parsed recipe.
        command: what it is parsed for.

    Raises:
        RecipeError: with the option to pass, or how to download.
    """
    for key, value in leaves(config):
        if value in FILL_IN and not Path(value).exists():
            if not (key.startswith("data.") and command in _WITHOUT_ROWS):
                raise RecipeError(f"{key} is not given: pass --{key} with {FILL_IN[value]}")
        elif key.startswith("model.") and key.endswith(".directory"):
            check_no_hub(key, value)
    check_outputs(config)


def check_outputs(config: Mapping[str, Any]) -> None:
    """Refuse a command whose ``--out`` or ``--to`` is a file or directory that its recipe names, or a recipe itself.

    Args:
        config: the parsed recipe and arguments of the command.

    Raises:
        RecipeError: with both options.
    """
    given = {name: Path(str(config[name])) for name in ("out", "to") if config.get(name)}
    read = [("config", str(one)) for one in config.get("config") or []]
    for key, value in (*leaves({**config, "config": None}), *read):
        for name, out in given.items():
            if key != name and out.exists() and Path(value).exists() and out.samefile(value):
                raise RecipeError(f"--{name} {out} is what {key} names: choose another name for what is written")


def check_no_hub(option: str, value: str) -> None:
    """Refuse an identifier of a hub where a directory is wanted, and say how to download it.

    Args:
        option: name of the option.
        value: what was given.

    Raises:
        RecipeError: there is no such directory, and it looks like an identifier.
    """
    if not _HUB_ID.fullmatch(value) or Path(value).exists() or Path(value).parent.exists():
        return
    folder = value.rpartition("/")[2]
    raise RecipeError(
        f"there is no directory {value}. If it is a model of a hub, download it and pass its folder:\n"
        f"  Hugging Face:  hf download {value} --local-dir {folder}\n"
        f"  ModelScope:    modelscope download --model {value} --local_dir {folder}\n"
        f"  --{option} {folder}"
    )


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and value of every text in a recipe."""
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, Mapping):
        for name, value in node.items():
            yield from leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from leaves(value, key)

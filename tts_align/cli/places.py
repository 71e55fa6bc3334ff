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
    """Refuse a recipe with a path that is still to be filled in, or an identifier of a hub instead of a directory.

    Args:
        config: the parsed recipe.
        command: what it is parsed for.

    Raises:
        RecipeError: with the option to pass, or how to download.
    """
    for key, value in _leaves(config):
        if value in FILL_IN and not Path(value).exists():
            if not (key.startswith("data.") and command in _WITHOUT_ROWS):
                raise RecipeError(f"{key} is not given: pass --{key} with {FILL_IN[value]}")
        elif key.startswith("model.") and key.endswith(".directory"):
            check_no_hub(key, value)


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


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and value of every text in a recipe."""
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, Mapping):
        for name, value in node.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))

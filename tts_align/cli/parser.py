# SPDX-License-Identifier: Apache-2.0
"""A parser whose errors are a line or two, in the words of the recipe, with the nearest right word."""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

import yaml
from jsonargparse import ArgumentParser, set_loader

from tts_align import PUBLIC
from tts_align.cli.errors import debugging, did_you_mean, fail
from tts_align.cli.expected import expected
from tts_align.cli.hints import with_hint
from tts_align.cli.own_code import unusable
from tts_align.cli.recipe import no_objective
from tts_align.utils.readers import ReadError, load_yaml

_NOISE = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "- Expected a <class 'NoneType'>",
    "Given value",
    "Subclass types expect one of:",
    "- a class path (str)",
    "- a dict with",
    "- a dict without",
    "- Expected a path but",
)
"""Lines of a parser's message that say how it searched, not what is wrong."""
PLAIN_MODE = "plain"
"""Name of the loader of option files of commands without a recipe."""
_CLASS = re.compile(r"Problem with given class_path '([\w.]+)'")
_OPTION = re.compile(r"Option '([\w.]+)' is not accepted")
_NO_PATH = re.compile(r"Expected a dot import path string: (\w+)$")


class PlainParser(ArgumentParser):
    """Reports a bad argument or recipe in a few lines instead of after two pages of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong, after where it came from if that is wanted, and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)  # a nested parser: let the outer one try its other alternatives
        if debugging():
            traceback.print_exception(ex or sys.exception(), file=sys.stderr)
        fail(explained(message, list(dict.fromkeys(_options(self))), self.prog.removeprefix("tts-align ")))


def explained(message: str, options: list[str], command: str = "") -> str:
    """A parser's message without its noise, and with the nearest right words.

    Args:
        message: what the parser says.
        options: dotted names of its options.
        command: name of the command.
    """
    if "Not a valid subclass of Objective. Got value: None" in message:
        return no_objective()
    if (said := unusable(message)) is not None:
        return said
    if (said := expected(message)) is not None:
        audio = "\n  --audio true writes recordings beside --out, in a folder of its name"
        return said + audio * said.startswith("audio:")
    message = with_hint(message, options, command)
    lines, owner = [], ""
    for line in message.splitlines():
        if not line.strip() or line.strip().startswith(_NOISE):
            continue
        if found := _CLASS.search(line):
            owner = found[1]
        if found := _OPTION.search(line):
            line += _instead(found[1], owner)
        elif found := _NO_PATH.search(line):
            line += did_you_mean(found[1], list(PUBLIC))
        lines.append(line)
    return "\n".join(lines)


def _instead(word: str, owner: str) -> str:
    """What a class takes instead of an argument that it does not have."""
    module, _, name = owner.rpartition(".")
    try:
        names = list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (ImportError, AttributeError, ValueError, TypeError):
        return ""
    return did_you_mean(word, names) or f"; {name} takes {', '.join(names)}"


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Dotted names of a parser's options, and of those of its subcommands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from (name for sub in action.choices.values() for name in _options(sub))
        else:
            yield action.dest


set_loader(PLAIN_MODE, load_yaml, (yaml.YAMLError, ReadError))

# SPDX-License-Identifier: Apache-2.0
"""What to write instead: for words that belong elsewhere, and for options that other programs call otherwise."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from tts_align.cli.commands import ARGUMENTS, OF_A_RECIPE
from tts_align.cli.errors import did_you_mean, fail
from tts_align.cli.shelf import find

ALIASES = {
    "batch_size": ("data.rows_per_step",),
    "beta": ("objective.beta",),
    "epochs": ("trainer.max_epochs",),
    "gpus": ("trainer.devices",),
    "learning_rate": ("model.optimizer.lr",),
    "lr": ("model.optimizer.lr",),
    "manifest": ("data.manifest", "source", "judged"),
    "model.learning_rate": ("model.optimizer.lr",),
    "model.lr": ("model.optimizer.lr",),
    "name": ("run.directory",),
    "output": ("run.directory", "out"),
    "run.name": ("run.directory",),
    "steps": ("trainer.max_steps",),
}
"""Options that are often looked for, and those that do it; the first that a command has."""
FILES = ("source", "judged")
"""Options of commands without a recipe that take what is to be read."""
_RESUMES = "; fit resumes by itself: give the same command again, or --run.overwrite true to begin anew"
_REQUIRED = re.compile(r"the following arguments are required: (.*)$")
_UNKNOWN = re.compile(r"(unrecognized arguments: (?!-)|unrecognized arguments: --|does not accept option ')([^\s'=]+)")


def check_words(args: Sequence[str]) -> None:
    """Refuse a recipe that is named without ``--config``, before anything heavy is loaded.

    Args:
        args: the command line of a command of a recipe.
    """
    words = args[1:]
    if words and not words[0].startswith("-"):
        is_recipe = words[0].endswith((".yaml", ".yml")) or find(words[0]) is not None
        said = words[0] if is_recipe else "and the name of a recipe, such as --config tkto"
        fail(f"{args[0]} takes no word before its options, got {words[0]}: write --config {said}")
    for at, word in enumerate(words):
        flag, equals, named = word.partition("=")
        if flag == "--recipe":
            named = named if equals else " ".join(words[at + 1 : at + 2])
            fail(f"there is no option --recipe: write --config {named}".rstrip())


def suggested(word: str, options: Sequence[str]) -> str:
    """The option that an unknown one probably means, as a question; or nothing.

    Args:
        word: an option without its dashes, dotted.
        options: those that there are.

    >>> suggested("max_epochs", ["trainer.max_epochs", "run.directory"])
    "; did you mean 'trainer.max_epochs'?"
    """
    if word == "resume" and "run.overwrite" in options:
        return _RESUMES
    last = word.rpartition(".")[2]
    tails = {one: one.rpartition(".")[2] for one in options}
    found = _alias(word, options) or [one for one, tail in tails.items() if tail == last]
    if not found and (near := did_you_mean(word, options)):
        return near
    if not found and (close := difflib.get_close_matches(last, [*tails.values(), *ALIASES], 1, 0.75)):
        found = [one for one, tail in tails.items() if tail == close[0]] or _alias(close[0], options)
    return f"; did you mean {' or '.join(map(repr, found[:3]))}?" if found else ""


def _alias(word: str, options: Sequence[str]) -> list[str]:
    """The option that does what another name stands for, if a command has it or the class that takes it."""
    known = [one for one in ALIASES.get(word, ()) if any(f"{one}.".startswith(f"{option}.") for option in options)]
    return known[:1]


def with_hint(message: str, options: Sequence[str], command: str = "") -> str:
    """A parser's message about an option that is unknown or missing, with what to write; any other as it is.

    Args:
        message: what the parser says.
        options: dotted names of the options.
        command: name of the command, where that is known.
    """
    if message.startswith("Unexpected config: "):
        return "--config: expected a YAML file of options, names and values; the one given holds something else"
    if found := _REQUIRED.search(message):
        names = [re.sub(rf"^({'|'.join(OF_A_RECIPE)})\.", "", name) for name in found[1].split(", ")]
        listed = ", ".join(f"--{name}" for name in names)
        message = f"{message[: found.start()]}the following options are required: {listed}"
        if "model.policy" in names:
            return f"{message}; a recipe holds them: write --config tkto, or another that tts-align recipes lists"
        return message + (
            f"\n  usage: tts-align {command} {ARGUMENTS[command]} [options]" if command in ARGUMENTS else ""
        )
    if found := _UNKNOWN.search(message):
        if found[1].endswith(": "):
            taken = [one for one in FILES if one in options]
            return message + "".join(f": write --{one} {found[2]}" for one in taken)
        return message + suggested(found[2], options)
    return message

# SPDX-License-Identifier: Apache-2.0
"""How a recipe is read: short names for classes, and errors of a line or two."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, set_loader

from tts_align import PUBLIC
from tts_align.objectives import Objective

MODE = "recipe"
"""Name of the loader for ``parser_mode``."""
OBJECTIVE_FLAGS = ("--objective", "--objective.help")
CONFIG_FLAGS = ("--config", "-c")
SECTIONS = "by_objective"
"""Key of an overlay whose entries each hold for one objective only."""
SHORT = {"cosyvoice": "CosyVoiceLM"}
"""Shorter names still, for what is typed most."""


class RecipeError(ValueError):
    """A recipe asks for what cannot be built."""


def fail(message: str) -> NoReturn:
    """End the program as a parser does after a wrong argument."""
    sys.stderr.write(f"tts-align: error: {message}\n")
    raise SystemExit(2)


def root_cause(error: BaseException) -> BaseException:
    """What an optional argument's constructor said, before the parser wrapped it in what all alternatives said."""
    while error.__cause__ is not None and str(error).startswith("Does not validate against any of the Union subtypes"):
        error = error.__cause__
    return error


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The nearest known word as a question, or nothing.

    >>> did_you_mean("tkot", ["dpo", "tkto"])
    "; did you mean 'tkto'?"
    """
    return "".join(f"; did you mean {match!r}?" for match in difflib.get_close_matches(word, known, n=1))


def objective_path(name: str) -> str:
    """Import path of a registered objective; an import path or a class name passes through."""
    objective = Objective.registry.get(name)
    if objective is not None:
        return f"{objective.__module__}.{objective.__qualname__}"
    if "." in name or name in {known.__name__ for known in Objective.registry.values()} or os.path.exists(name):
        return name
    known = sorted(Objective.registry)
    fail(
        f"unknown objective {name!r}: expected one of {', '.join(known)}, or an import path{did_you_mean(name, known)}"
    )


def full_path(name: str) -> str:
    """Import path of a public class; anything else passes through.

    >>> full_path("cosyvoice") == full_path("CosyVoiceLM")
    True
    """
    name = SHORT.get(name, name)
    return f"{PUBLIC[name]}.{name}" if name in PUBLIC else name


def _expand(node: Any) -> Any:
    """Write out public class names, wherever a ``class_path`` stands."""
    if isinstance(node, dict):
        return {
            key: full_path(value) if key == "class_path" and isinstance(value, str) else _expand(value)
            for key, value in node.items()
        }
    return [_expand(item) for item in node] if isinstance(node, list) else node


def load_recipe(text: str) -> Any:
    """Load YAML and write out short names.

    ``objective: tkto`` and ``objective: {name: tkto, beta: 0.1}`` become ``class_path`` and ``init_args``, and so does
    ``policy: {class_path: Qwen2CodecLM, ...}`` with its module. What is saved after a run is the long form.
    """
    recipe = _expand(yaml.safe_load(text))
    if not isinstance(recipe, dict):
        return recipe
    recipe.pop(SECTIONS, None)  # for expand_sections, which knows the objective
    objective = recipe.get("objective")
    if isinstance(objective, str):
        recipe["objective"] = {"class_path": objective_path(objective)}
    elif isinstance(objective, dict) and "name" in objective:
        knobs = {key: value for key, value in objective.items() if key != "name"}
        recipe["objective"] = {"class_path": objective_path(str(objective["name"])), "init_args": knobs}
    model = recipe.get("model")
    if isinstance(model, dict):
        recipe["model"] = {key: full_path(v) if isinstance(v, str) else v for key, v in model.items()}
    return recipe


def expand_sections(args: Sequence[str]) -> list[str]:
    """Behind every overlay with a section for the chosen objective put that section, as a recipe of its own.

    An overlay may hold ``by_objective: {tkto: {...}, sft: {...}}``: what suits a model under one objective means
    nothing, or something else, under another.
    """
    recipes = {at: _recipe(args[at]) for at in _config_places(args)}
    sections = {at: recipe[SECTIONS] for at, recipe in recipes.items() if SECTIONS in recipe}
    if not sections:
        return list(args)
    chosen = _chosen_objective(args, recipes)
    expanded: list[str] = []
    for at, arg in enumerate(args):
        expanded.append(arg)
        for name, section in sections.get(at, {}).items():
            if objective_path(name) == chosen:
                expanded += [CONFIG_FLAGS[0], yaml.safe_dump(section)]
    return expanded


def _config_places(args: Sequence[str]) -> list[int]:
    """Where recipes are named."""
    flagged = tuple(f"{flag}=" for flag in CONFIG_FLAGS)
    after = [at + 1 for at, arg in enumerate(args[:-1]) if arg in CONFIG_FLAGS]
    return sorted(after + [at for at, arg in enumerate(args) if arg.startswith(flagged)])


def _recipe(arg: str) -> dict[str, Any]:
    """A recipe as it is written; what cannot be read is left for the parser to complain about."""
    try:
        with open(arg.partition("=")[2] if arg.startswith("-") else arg, encoding="utf-8") as file:
            recipe = yaml.safe_load(file)
    except (OSError, yaml.YAMLError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _chosen_objective(args: Sequence[str], recipes: Mapping[int, dict[str, Any]]) -> str:
    """Import path of the objective named last, in a recipe or by a flag."""
    chosen = ""
    for at, arg in enumerate(args):
        named: Any = recipes.get(at, {}).get("objective")
        if arg.startswith(f"{OBJECTIVE_FLAGS[0]}="):
            named = arg.partition("=")[2]
        elif at and args[at - 1] == OBJECTIVE_FLAGS[0]:
            named = arg
        if isinstance(named, dict):
            named = named.get("name") or named.get("class_path")
        chosen = objective_path(str(named)) if named else chosen
    return chosen


def expand_flags(args: Sequence[str]) -> list[str]:
    """Write out short names that are given as flags: ``--objective tkto``, ``--model.policy Qwen2CodecLM``."""
    expanded, previous = [], ""
    for arg in args:
        flag, equals, value = arg.partition("=") if arg.startswith("--") else (previous, "", arg)
        if (arg.startswith("--") and not equals) or not value:
            expanded.append(arg)
        else:
            if flag in OBJECTIVE_FLAGS:
                value = objective_path(value)
            elif flag.startswith("--model."):
                value = full_path(value)
            expanded.append(f"{flag}={value}" if equals else value)
        previous = arg if arg.startswith("--") and not equals else ""
    return expanded


class PlainParser(ArgumentParser):
    """Reports a bad argument or recipe in a few lines instead of after two pages of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and exit with status 2."""
        if not self.exit_on_error or os.environ.get("JSONARGPARSE_DEBUG", "false").lower() not in (
            "false",
            "no",
            "off",
            "0",
        ):
            super().error(message, ex)  # a nested parser: let the outer one try its other alternatives
        if "Not a valid subclass of Objective. Got value: None" in message:
            message = f"no objective chosen: pass --objective, one of {', '.join(sorted(Objective.registry))}"
        unknown = re.search(r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", message)
        if unknown:
            message += did_you_mean(unknown[1] or unknown[2], list(_options(self)))
        noise = ("Does not validate", "Subtypes:", "Errors:", "- Expected a <class 'NoneType'>", "Given value")
        fail("\n".join(line for line in message.splitlines() if not line.strip().startswith(noise)))


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Dotted names of a parser's options, and of those of its subcommands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from (name for sub in action.choices.values() for name in _options(sub))
        else:
            yield action.dest


set_loader(MODE, load_recipe, (yaml.YAMLError,))

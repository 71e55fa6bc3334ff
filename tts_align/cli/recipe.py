# SPDX-License-Identifier: Apache-2.0
"""How a recipe is read: short names for classes, sections for one objective."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from jsonargparse import set_loader

from tts_align import PUBLIC
from tts_align.cli.classes import check_written
from tts_align.cli.commands import WITHOUT_OBJECTIVE
from tts_align.cli.errors import RecipeError, debugging, did_you_mean, fail
from tts_align.cli.moved import gone, new_key, new_path, outdated
from tts_align.cli.optimizer import own_defaults
from tts_align.cli.shelf import CONFIG_FLAGS, config_places, named_at
from tts_align.objectives import Objective
from tts_align.utils.readers import ReadError, load_yaml, read_yaml

MODE = "recipe"
"""Name of the loader for ``parser_mode``."""
OBJECTIVE_FLAGS = ("--objective", "--objective.help")
MODULES_FLAGS = ("--run.modules", "--run.modules+")
GROUPS = ("run", "model", "data", "trainer")
"""Parts of a recipe that hold names and values."""
SECTIONS = "by_objective"
"""Key of an overlay whose entries each hold for one objective only."""
SHORT = {"cosyvoice": "CosyVoiceLM"}
"""Shorter names still, for what is typed most."""


def objective_path(name: str) -> str:
    """Import path of a registered objective; an import path or a class name passes through."""
    objective = Objective.registry.get(name)
    if objective is not None:
        return f"{objective.__module__}.{objective.__qualname__}"
    known = sorted(Objective.registry)
    if (
        "." not in name
        and name not in {one.__name__ for one in Objective.registry.values()}
        and not os.path.exists(name)
    ):
        fail(
            f"unknown objective {name!r}: expected one of {', '.join(known)}, or an import path"
            f"{did_you_mean(name, known)}; a class of yours has a name here when run.modules names its module"
        )
    return name


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
    recipe = _expand(load_yaml(text))
    if not isinstance(recipe, dict):
        return recipe
    _check_groups(recipe)
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


def _check_groups(recipe: Mapping[Any, Any], within: str = "") -> None:
    """Refuse a recipe, or a section of one, whose names are no text or whose parts are no names and values."""
    for key, value in recipe.items():
        if not isinstance(key, str):
            raise ReadError(within or "recipe", f"expected names and values, got {key!r:.60} for a name")
        if key in GROUPS and not isinstance(value, dict):
            raise ReadError(f"{within}.{key}" if within else key, f"expected names and values, got {value!r:.60}")


def _check_sections(sections: Any) -> None:
    """Refuse sections for single objectives that are not what their names say, whichever objective is chosen."""
    if not isinstance(sections, dict):
        raise ReadError(SECTIONS, f"expected a section for each objective, got {sections!r:.60}")
    for name, section in sections.items():
        if not isinstance(name, str):
            raise ReadError(SECTIONS, f"expected the name of an objective, got {name!r:.60}")
        if section is not None and not isinstance(section, dict):
            raise ReadError(f"{SECTIONS}.{name}", f"expected names and values, got {section!r:.60}")
        _check_groups(section or {}, f"{SECTIONS}.{name}")


def expand(args: Sequence[str]) -> list[str]:
    """A command line with everything short written out: sections of overlays, names of classes.

    Args:
        args: the command line.
    """
    args = list(args)
    recipes = read_recipes(args)
    check_names(args, recipes)
    check_order(args, recipes)
    check_chosen(args, recipes)
    import_modules(args, recipes)
    args = expand_flags(expand_sections(args, recipes))
    written = {at: recipe_at(args, at) for at in config_places(args)}
    check_imports(args, written)
    return own_defaults(args, written)


def check_imports(args: Sequence[str], recipes: Mapping[int, Any]) -> None:
    """Refuse what would be imported from Python's standard library: parsing a class path imports its module.

    Args:
        args: with everything short written out.
        recipes: of the command line, by their place on it.
    """
    for at, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        value = value if equals else args[at + 1] if at + 1 < len(args) else ""
        try:
            if at in recipes:
                check_written(recipes[at])
            elif flag.startswith("--"):
                check_written(load_yaml(value, flag) if value[:1] in ("{", "[") else value, flag[2:].rstrip("+"))
        except ReadError:
            continue  # for the parser to complain about
        except RecipeError as error:
            fail(str(error))


def recipe_at(args: Sequence[str], at: int) -> Any:
    """The recipe at a place of a command line: in a file or, as sections of overlays are put, in words."""
    text = named_at(args, at)
    try:
        return load_yaml(text) if "\n" in text or text.startswith("{") else _read(text)
    except ReadError:
        return {}  # for the parser to complain about


def read_recipes(args: Sequence[str]) -> dict[int, dict[str, Any]]:
    """The recipes that a command line names, as they are written, by their place on it."""
    return {at: _read(named_at(args, at)) for at in config_places(args)}


def _read(path: str) -> dict[str, Any]:
    """A recipe as it is written; what cannot be read is left for the parser to complain about."""
    try:
        recipe = read_yaml(path)
    except ReadError as error:
        if os.path.exists(path):
            fail(str(error))
        return {}
    except OSError:
        return {}
    if recipe is not None and not isinstance(recipe, dict):
        kind = "a list" if isinstance(recipe, list) else "plain text"
        fail(f"{path} is no recipe: expected names and values in YAML, such as objective: tkto, got {kind}")
    if recipe is None or not all(isinstance(key, str) for key in recipe):
        return {}
    if SECTIONS in recipe:
        try:
            _check_sections(recipe[SECTIONS])
        except ReadError as error:
            fail(f"{path}: {error}")
    return recipe


def check_names(args: Sequence[str], recipes: Mapping[int, dict[str, Any]]) -> None:
    """Refuse names of earlier versions, in recipes and in flags; the message holds those of today."""
    for at, recipe in recipes.items():
        if lines := list(outdated(recipe)):
            fail("\n  ".join([f"{named_at(args, at)} was written by an earlier version; change in it:", *lines]))
    for before, arg in zip(["", *args], args, strict=False):
        flag, _, value = arg.partition("=")
        if flag.startswith("--") and (key := new_key(flag)):
            fail(f"{flag} is now {key}")
        if flag.startswith("--") and (why := gone(flag)):
            fail(f"{flag} is no longer there, leave it out: {why}")
        if new := new_path(value or arg):
            fail(f"{before if not value else flag}: {value or arg} is now {new}")


def check_order(args: Sequence[str], recipes: Mapping[int, dict[str, Any]]) -> None:
    """Refuse an overlay that stands before its recipe, which would take back what the overlay says."""
    chooses = [at for at, recipe in recipes.items() if _named_objective(recipe.get("objective"))]
    early = [at for at in recipes if chooses and at < chooses[0] and recipes[at]]
    if early:
        order = [chooses[0], *early, *(at for at in recipes if at > chooses[0])]
        written = " ".join(f"{CONFIG_FLAGS[0]} {named_at(args, at)}" for at in order)
        fail(
            f"{named_at(args, early[0])} chooses no objective, so it is an overlay, and stands before its recipe, "
            f"which would override it: write {written}"
        )


def check_chosen(args: Sequence[str], recipes: Mapping[int, dict[str, Any]]) -> None:
    """Refuse overlays without a recipe that chooses an objective, for a command that needs one."""
    if not args or args[0] in WITHOUT_OBJECTIVE or any(arg.startswith(OBJECTIVE_FLAGS[0]) for arg in args):
        return
    alone = all(recipe and not _named_objective(recipe.get("objective")) for recipe in recipes.values())
    if recipes and alone:  # what could not be read, or is the text of a recipe, is the parser's to look at
        fail(no_objective([named_at(args, at) for at in recipes]))


def no_objective(overlays: Sequence[str] = ()) -> str:
    """What to do where no objective is chosen.

    Args:
        overlays: recipes that are named and choose none.
    """
    known = ", ".join(sorted(Objective.registry))
    if not overlays:
        return f"no objective chosen: pass --objective, one of {known}, or name a recipe, such as --config tkto"
    are = "is an overlay, which follows" if len(overlays) == 1 else "are overlays, which follow"
    written = " ".join(f"{CONFIG_FLAGS[0]} {one}" for one in ("tkto", *overlays))
    named = " and ".join(overlays)
    return f"no objective chosen: {named} {are} a recipe: write {written}, or pass --objective, one of {known}"


def import_modules(args: Sequence[str], recipes: Mapping[int, dict[str, Any]]) -> None:
    """Import what ``run.modules`` names, so that the classes in it are known by their registered names."""
    runs = [recipe.get("run") for recipe in recipes.values()]
    named: list[Any] = [run.get("modules") for run in runs if isinstance(run, dict)]
    for before, arg in zip(["", *args], args, strict=False):
        flag, equals, value = arg.partition("=")
        if flag in MODULES_FLAGS and equals:
            named.append(load_yaml(value, flag))
        elif before in MODULES_FLAGS:
            named.append(load_yaml(arg, before))
    for given in named:
        names = [given] if isinstance(given, str) else given or []
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            fail(f"run.modules: expected names of modules, such as mine or [mine, more.of_mine], got {given!r:.80}")
        for name in names:
            _import(name)


def _import(name: str) -> None:
    """Import a module of the user's; what is wrong with it is the user's to mend."""
    try:
        importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            fail(f"run.modules: no module named {name!r} in {os.getcwd()} or among the installed packages")
        if debugging():
            raise
        fail(f"run.modules: {name} cannot be imported: {type(error).__name__}: {error}")


def expand_sections(args: Sequence[str], recipes: Mapping[int, dict[str, Any]] | None = None) -> list[str]:
    """Behind every overlay with a section for the chosen objective put that section, as a recipe of its own.

    An overlay may hold ``by_objective: {tkto: {...}, sft: {...}}``: what suits a model under one objective means
    nothing, or something else, under another.

    Args:
        args: the command line.
        recipes: what :func:`read_recipes` gives for it.
    """
    recipes = read_recipes(args) if recipes is None else recipes
    sections = {at: recipe[SECTIONS] for at, recipe in recipes.items() if SECTIONS in recipe}
    if not sections:
        return list(args)
    chosen = _chosen_objective(args, recipes)
    expanded: list[str] = []
    for at, arg in enumerate(args):
        expanded.append(arg)
        for name, section in sections.get(at, {}).items():
            if objective_path(name) == chosen and section is not None:
                expanded += [CONFIG_FLAGS[0], yaml.safe_dump(section)]
    return expanded


def _named_objective(given: Any) -> str:
    """What a recipe's ``objective`` names; empty if it only sets arguments, or is not there."""
    if isinstance(given, dict):
        given = given.get("name") or given.get("class_path")
    return str(given or "")


def _chosen_objective(args: Sequence[str], recipes: Mapping[int, dict[str, Any]]) -> str:
    """Import path of the objective named last, in a recipe or by a flag."""
    chosen = ""
    for at, arg in enumerate(args):
        named = _named_objective(recipes.get(at, {}).get("objective"))
        if arg.startswith(f"{OBJECTIVE_FLAGS[0]}="):
            named = arg.partition("=")[2]
        elif at and args[at - 1] == OBJECTIVE_FLAGS[0]:
            named = arg
        chosen = objective_path(named) if named else chosen
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


set_loader(MODE, load_recipe, (yaml.YAMLError, ReadError))

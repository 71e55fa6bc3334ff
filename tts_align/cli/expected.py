# SPDX-License-Identifier: Apache-2.0
"""What a value should have been, in plain words: the parser speaks of Python's types and of how it searched."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tts_align import PUBLIC
from tts_align.cli.errors import did_you_mean

_KEY = re.compile(r'Parser key "([\w.]+)":$')
_OWNER = re.compile(r"Problem with given class_path '([\w.]+)':$")
_TYPE = re.compile(r"Expected a (<class '[\w.]+'>|[\w.]*Literal\[.*\])(?:\. Got value: (.*))?$")
_NO_CLASS = re.compile(
    r"(?:Expected a dot import path string: (.*)"
    r"|(?:Import path does not correspond to a|Not a valid) subclass of \w+(?:\. Got value: (.*))?)$"
)
_NO_MODULE = re.compile(r"No module named '([\w.]+)'$")
_NO_NAME = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'$")
_REQUIRED = re.compile(r"the following arguments are required: ([\w., ]+)$")
_GIVEN = re.compile(r"Given value: (?:NestedArg\(.*val='?(.*?)'?\)|(.*?))(?:\. Got value: .*)?$")
_SEARCH = (
    *("Does not validate", "Errors:", "Given value type", "Expected a path but"),
    *("Subclass types expect", "a class path (str)", "a dict with"),
)
"""Beginnings of lines that say how the parser searched."""
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "dict": "names and values",
    "Mapping": "names and values",
    "Path": "a path",
}
_LISTS = ("Sequence", "Iterable", "list", "tuple", "set")
_LIBRARIES = ("tts_align", "torch", "lightning")
_MOST = 16
"""Most names of classes that are listed."""


@dataclass
class _Place:
    """What a parser found wrong with the value of one key."""

    types: list[str] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)
    is_class: bool = False
    why: str = ""
    given: str = ""
    subtypes: str = ""

    def __bool__(self) -> bool:
        """Whether anything is wrong here."""
        return bool(self.types or self.choices or self.is_class or self.why)


def expected(message: str) -> str | None:
    r"""What was expected of which key, and what came.

    Args:
        message: what the parser says.

    Returns:
        A line; ``None`` for a message that says anything else.

    >>> expected('Parser key "data":\n  Parser key "seed":\n    Expected a <class \'int\'>. Got value: x')
    'data.seed: expected a whole number, got x'
    """
    places: dict[str, _Place] = {}
    keys: list[tuple[int, str]] = []
    owner = ""
    for line in filter(str.strip, message.splitlines()):
        depth, text = len(line) - len(line.lstrip()), line.strip().removeprefix("- ")
        while keys and keys[-1][0] >= depth:
            keys.pop()
        if found := _KEY.search(text):
            keys.append((depth, found[1]))
            continue
        key = ".".join(name for _, name in keys)
        place = places.setdefault(key, _Place())
        if text.startswith("Subtypes:"):
            place.subtypes = text
        elif found := _OWNER.match(text):
            owner = found[1]
        elif found := _TYPE.match(text):
            _add(place, found[1])
            place.given = place.given or found[2] or ""
        elif found := _NO_CLASS.match(text):
            place.is_class, place.given = True, place.given or found[1] or found[2] or ""
        elif found := _GIVEN.match(text):
            place.given = place.given or found[1] or found[2] or ""
        elif found := _NO_MODULE.match(text):
            place.why = _no_module(owner, found[1])
        elif found := _NO_NAME.match(text):
            place.why = f"{found[1]} has no {found[2]}{did_you_mean(found[2], _names_in(found[1]))}"
        elif found := _REQUIRED.match(text):
            flags = [f"--{key}.init_args.{name.strip()}" for name in found[1].split(",")]
            place.why = f"{owner.rpartition('.')[2]} needs {found[1]}: pass {' and '.join(flags)}"
        elif not text.startswith(_SEARCH):
            return None
    faulty = {key: place for key, place in places.items() if key and place}
    if not faulty:
        return None
    deepest = max(faulty, key=lambda key: key.count("."))
    return f"{deepest}: {faulty[deepest].why or _said(deepest, faulty[deepest])}"


def _add(place: _Place, wanted: str) -> None:
    """Note one type that a value may have, as the parser writes it."""
    if "Literal[" in wanted:
        choices = ast.literal_eval(wanted[wanted.index("[") :])
        place.choices += [str(one) for one in choices if str(one) not in place.choices]
        return
    name = wanted.removeprefix("<class '").removesuffix("'>").rpartition(".")[2]
    word = "a list" if name in _LISTS else _WORDS.get(name, "")
    if word and word not in place.types:
        place.types.append(word)


def _said(key: str, place: _Place) -> str:
    """What was expected at a key, and what came."""
    given = place.given if len(place.given) <= 80 else f"{place.given[:77]}..."
    kinds = _kinds(key) if place.is_class else ()
    if place.is_class and (kinds or not (place.types or place.choices)):
        known = sorted(_names(kinds), key=str.lower)
        near = did_you_mean(given.rpartition(".")[2], known)
        listed = f"one of {', '.join(known)}" if 0 < len(known) <= _MOST else "the name of a class"
        return f"expected {listed}, or the import path of a class of yours, got {given}{near}"
    types = [word for word in place.types if not place.choices or word != _WORDS["int"] or "'int'" in place.subtypes]
    words = [f"{word}, such as [{given}]" if word == "a list" and given.isalnum() else word for word in types]
    words += [f"one of {', '.join(place.choices)}"] if place.choices else []
    return f"expected {' or '.join(words)}, got {given}"


def _kinds(key: str) -> tuple[type, ...]:
    """What a class must be that is named at a key; empty where that is not known."""
    from tts_align.cli.classes import slots
    from tts_align.evaluation.judges.base import Judge
    from tts_align.evaluation.measures.base import UtteranceMeasure

    of_commands: dict[str, tuple[type, ...]] = {
        "judge": (Judge,),
        "readings": (Judge,),
        "measures": (UtteranceMeasure,),
    }
    return (slots() | of_commands).get(key, ())


def _names(kinds: Sequence[type]) -> set[str]:
    """Names under which a recipe finds classes: those of this package and of the libraries that are of a kind."""
    for module in set(PUBLIC.values()) if kinds else ():
        try:
            importlib.import_module(module)
        except ImportError:  # of what is not installed
            continue
    found: set[type] = {one for kind in kinds for one in _subclasses(kind)}
    # Wrappers of optimisers, which no recipe can name, are there only if something has loaded or made them.
    found = {one for one in found if not one.__module__.startswith("torch.distributed.") and _is_found(one)}
    return {one.__name__ for one in found if one.__module__.partition(".")[0] in _LIBRARIES and _is_whole(one)}


def _subclasses(kind: type) -> Iterator[type]:
    one: type
    for one in kind.__subclasses__():
        yield one
        yield from _subclasses(one)


def _is_found(kind: type) -> bool:
    """Whether a class stands under its name where it says; Lightning makes others while it trains."""
    return getattr(sys.modules.get(kind.__module__), kind.__name__, None) is kind


def _is_whole(kind: type) -> bool:
    return not inspect.isabstract(kind) and not kind.__name__.startswith(("_", "Dummy"))


def _no_module(path: str, missing: str) -> str:
    """Why a class cannot be imported, and where it is looked for."""
    if not f"{path}.".startswith(f"{missing}."):
        return f"{path} cannot be imported: it needs a module {missing}, which is not installed"
    return (
        f"no module named {missing!r} in the current folder, {os.getcwd()}, or among the installed packages: start the "
        "command where it lies, or install it; run.modules names modules of yours whose classes then have short names"
    )


def _names_in(module: str) -> list[str]:
    try:
        return dir(importlib.import_module(module))
    except ImportError:
        return []

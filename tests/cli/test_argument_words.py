# SPDX-License-Identifier: Apache-2.0
"""Descriptions of arguments, as ``--help`` and ``.help`` show them: a noun first, and a whole phrase."""

import importlib
import inspect
import pkgutil
import re
import typing
from collections.abc import Iterator

import pytest

import tts_align
from tts_align.cli import help
from tts_align.cli.classes import slots
from tts_align.data.datamodule import AlignData
from tts_align.evaluation.measures.base import UtteranceMeasure
from tts_align.training.module import AlignModule
from tts_align.training.run import RunSettings

NO_NOUN = re.compile(
    r"(a|an|of|at|about|above|after|also|as|before|behind|below|beside|between|beyond|by|during|for|from|if|in|inside|"
    r"instead|into|on|only|over|than|that|through|to|under|until|upon|what|when|where|which|while|who|whose|why|how|"
    r"with|within|without|holds|is|are|has|bring|check|choose|compute|count|cut|draw|exit|give|keep|leave|let|make|"
    r"print|put|raise|refuse|replace|save|say|show|skip|speak|start|stop|take|tell|train|try|wait|warn|write)\b",
    re.IGNORECASE,
)
"""First words with which a description has no noun in front; ``whether`` is the one for a switch."""


def fault(text: str) -> str:
    """What is wrong with a description; empty if nothing is."""
    if len(text.split()) < 2:
        return "one word is no description"
    first = NO_NOUN.match(text)
    return f"begins with {first[0]!r}" if first else ""


def imported() -> None:
    """Import every module of the package that can be, so that subclasses are known."""
    for module in pkgutil.walk_packages(tts_align.__path__, "tts_align."):
        if not module.name.endswith(("__main__", "training.testing")):
            importlib.import_module(module.name)


def below(kind: type) -> Iterator[type]:
    yield kind
    for one in kind.__subclasses__():
        yield from below(one)


def named_in(hint: object) -> Iterator[type]:
    """The package's classes in an annotation."""
    if inspect.isclass(hint) and hint.__module__.startswith("tts_align."):
        yield hint
    for part in typing.get_args(hint):
        yield from named_in(part)


def classes() -> list[type]:
    """All classes of the package that a recipe can name, and the records that their arguments are."""
    imported()
    kinds = {kind for kinds in slots().values() for kind in kinds} | {UtteranceMeasure}
    found = [one for kind in kinds for one in below(kind) if one.__module__.startswith("tts_align.")]  # no test's own
    found += [AlignModule, AlignData, RunSettings]
    for one in found:  # grows while it is walked
        for hint in hints(one).values():
            found += [other for other in named_in(hint) if other not in found and other.__init__ is not object.__init__]
    return sorted({one for one in found if one.__module__.startswith("tts_align.")}, key=lambda one: one.__qualname__)


def hints(one: type) -> dict[str, object]:
    try:
        return typing.get_type_hints(one.__init__)
    except (NameError, TypeError):
        return {}


def described(one: type) -> dict[str, str]:
    return help._argument_texts(inspect.getdoc(one) or "") if "__init__" in vars(one) or one.__doc__ else {}


def test_every_class_of_a_recipe_describes_its_arguments_by_nouns():
    found = [one for one in classes() if not one.__name__.startswith("_")]
    assert {"TKTO", "CosyVoiceLM", "WhisperJudge", "MelVocoder", "MelFSQ", "KeepBest", "Clipping", "Sampling"} <= {
        one.__name__ for one in found
    }
    faults = [
        f"{one.__module__}.{one.__name__}.{name}: {fault(text)}: {text}"
        for one in found
        for name, text in described(one).items()
        if fault(text)
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("command", [*help.OWN, "fit"])
def test_every_option_is_described_by_a_noun(command: str):
    sources = [*help.OWN.get(command, ()), *help.OF_THE_RECIPE.values()]
    faults = [
        f"{option.name}: {fault(option.text)}: {option.text}"
        for source in sources
        for option in help.options(source)
        if fault(option.text)
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "text", ["what to do", "how it is drawn", "of the reward model", "at most 3 rows", "count those only", "seed"]
)
def test_a_fault_is_seen(text: str):
    assert fault(text)
    assert not fault("whether to count those only")

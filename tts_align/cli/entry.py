# SPDX-License-Identifier: Apache-2.0
"""The ``tts-align`` command: finds what is asked for, and loads only what it needs."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Callable
from inspect import cleandoc
from typing import TYPE_CHECKING

from tts_align.cli.commands import COMMANDS, OF_A_RECIPE, usage
from tts_align.cli.errors import DEBUG, did_you_mean, fail, note, plain_errors
from tts_align.cli.hints import check_words
from tts_align.cli.shelf import find_recipes
from tts_align.cli.streams import make_ready
from tts_align.utils import signals

if TYPE_CHECKING:
    from tts_align.cli.lightning import AlignCLI

TRACEBACK = ("--debug", "--traceback")
"""Flags of any command that show where in the code an error came from."""


def run(args: list[str] | None = None) -> AlignCLI:
    """Parse ``args`` (the command line by default), run a command of a recipe and hand back the parts.

    For tests and notebooks; a command with several processes needs the command line.

    >>> from tts_align.cli.entry import run
    >>> cli = run(["test", "--config", "dpo"])  # doctest: +SKIP
    >>> cli.trainer.callback_metrics  # doctest: +SKIP
    """
    args = _without_traceback(sys.argv[1:] if args is None else args)
    _help_if_wanted(args[0] if args else "", args)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a recipe may name a class in the user's own folder, none that is installed
    check_words(args)
    args = find_recipes(args)  # before anything heavy is loaded: the name may be wrong
    from tts_align.cli.lightning import AlignCLI

    with plain_errors():
        return AlignCLI(args)


def _without_traceback(args: list[str]) -> list[str]:
    """The command line without ``--debug``, which holds from now on if it was there."""
    if not set(TRACEBACK).isdisjoint(args):
        os.environ[DEBUG] = "true"
    return [arg for arg in args if arg not in TRACEBACK]


def _help_if_wanted(command: str, args: list[str]) -> None:
    """Print the help of a command and end, if the command line asks for it."""
    from tts_align.cli import help

    if command in COMMANDS and help.wanted(args):
        print(help.show(command, trainer=help.TRAINER_HELP in args), end="")
        raise SystemExit(0)


def prepare(args: list[str]) -> None:
    """The command ``prepare``: needs no recipe."""
    from tts_align.cli.prepare import Processes, prepare

    _plain_command("prepare", args, prepare, trainer=Processes)


def label(args: list[str]) -> None:
    """The command ``label``: needs no model, unless the rule asks for what a reward model hears."""
    from tts_align.cli.label import LabelRule, label

    _plain_command("label", args, label, rule=LabelRule)


def score(args: list[str]) -> None:
    """The command ``score``: needs recordings and something that listens, but no model that speaks."""
    from tts_align.cli.score import Processes, score, with_recipes

    with plain_errors():
        words = with_recipes(args)
    _plain_command("score", words, score, trainer=Processes)


def compare(args: list[str]) -> None:
    """The command ``compare``: needs no recipe and no model."""
    from tts_align.cli.compare import compare

    _plain_command("compare", named(args, ("first", "second")), compare)


def named(args: list[str], names: tuple[str, ...]) -> list[str]:
    """Words before the first option as options of these names; dashes in options as underscores, alone they are true.

    >>> named(["runs/a", "runs/b", "--fail-on-regression", "--out", "x"], ("first", "second"))
    ['--first=runs/a', '--second=runs/b', '--fail_on_regression=true', '--out', 'x']
    """
    count = next((place for place, word in enumerate(args) if word.startswith("-")), len(args))
    if count > len(names):
        fail(f"expected at most {len(names)} folders, got {' '.join(args[:count])}")
    found = [f"--{name}={word}" for name, word in zip(names, args[:count], strict=False)]
    for word, following in zip(args[count:], [*args[count + 1 :], "--"], strict=False):
        option, equals, value = word.partition("=")
        if option.startswith("--"):
            option = f"--{option[2:].replace('-', '_')}"
            equals, value = (equals, value) if equals or not following.startswith("--") else ("=", "true")
        found.append(option + equals + value)
    return found


def listen(args: list[str]) -> None:
    """The commands ``listen make``, ``listen score`` and ``listen label``: need no model."""
    from tts_align.cli.listen import FUNCTIONS, GROUPS, positional

    name = args[0] if args else ""
    if name not in FUNCTIONS:
        fail(f"expected `tts-align listen` with one of {', '.join(FUNCTIONS)}{did_you_mean(name, list(FUNCTIONS))}")
    _plain_command(f"listen {name}", positional(name, args[1:]), FUNCTIONS[name], **GROUPS[name])


def demo(args: list[str]) -> None:
    """The command ``demo build``."""
    if args[:1] != ["build"]:
        fail(f"expected `tts-align demo build`, which would {COMMANDS['demo build']}")
    from tts_align.cli.demo.build import GateError
    from tts_align.cli.demo.command import build_demo

    try:
        _plain_command("demo build", args[1:], build_demo)
    except GateError as error:
        fail(str(error))


def recipes(args: list[str]) -> None:
    """The command ``recipes``: needs nothing."""
    from tts_align.cli.shelf import recipes

    recipes(args)


PLAIN = {
    "prepare": prepare,
    "label": label,
    "score": score,
    "compare": compare,
    "listen": listen,
    "demo": demo,
    "recipes": recipes,
}
"""Commands without a recipe."""


def _plain_command(command: str, args: list[str], function: Callable[..., object], **groups: type | None) -> None:
    """Run a function whose arguments are the command's options.

    Args:
        command: its name.
        args: the command line after it.
        function: what it does.
        groups: arguments that are made from options of their own by a class, or left out.
    """
    from tts_align.cli.parser import PLAIN_MODE, PlainParser

    args = _without_traceback(args)
    summary = (function.__doc__ or "").partition("Args:")[0]
    name, text = f"tts-align {command}", cleandoc(summary)
    parser = PlainParser(prog=name, description=text, allow_abbrev=False, parser_mode=PLAIN_MODE)
    parser.add_argument("-c", "--config", action="config", help="YAML file with these options.")
    parser.add_function_arguments(function, skip=set(groups))
    for name, kind in groups.items():
        if kind is not None:
            parser.add_class_arguments(kind, name)
    with plain_errors(faults=True):
        options = parser.instantiate(parser.parse_args(args))
        options.pop("config", None)
        function(**options)


def main(args: list[str] | None = None) -> None:
    """Console entry point; returns nothing, because ``sys.exit`` would print what it returns.

    Whoever reads what is printed may have read enough: ``tts-align recipes | head`` ends quietly, as other tools do.

    Args:
        args: the command line by default.
    """
    make_ready()
    args = _without_traceback(sys.argv[1:] if args is None else args)
    # Python looks through all objects once more before it ends, for more than a second, although the system takes the
    # memory back anyway: what is frozen it passes over.
    atexit.register(gc.freeze)
    with signals.handled():
        try:
            with plain_errors(faults=True):
                _run_command(args)
                sys.stdout.flush()
                signals.check()  # asked while its last item was finished: it ends as others that were asked do
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in the buffer goes nowhere at exit
            raise SystemExit(128 + 13) from None  # as a program that SIGPIPE ends
        except signals.Interrupted as end:
            note(f"tts-align: {end}; what was finished is kept, and the same command resumes")
            raise


def _run_command(args: list[str]) -> None:
    if args[:1] == ["help"]:
        args = [*args[1:], "--help"]
    command = args[0] if args else "--help"
    full = " ".join(args[:2]) if " ".join(args[:2]) in COMMANDS else command
    if command in ("-h", "--help"):
        print(usage(), end="")
    elif command == "--version":
        from tts_align import __version__

        print(f"tts-align {__version__}")
    elif command not in (*OF_A_RECIPE, *PLAIN):
        near = did_you_mean(command, [*COMMANDS, "--help", "--version"])
        fail(f"unknown command {command!r}: expected one of {', '.join(COMMANDS)}{near}")
    else:
        _help_if_wanted(full, args)
        if command != "recipes":
            note(f"tts-align {full}: loading libraries")  # PyTorch, Lightning, transformers: some seconds
        PLAIN[command](args[1:]) if command in PLAIN else run(args)

# SPDX-License-Identifier: Apache-2.0
"""The ``tts-align`` command: finds the verb, and loads only what it needs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from inspect import cleandoc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tts_align.cli.lightning import AlignCLI

DEBUG = "JSONARGPARSE_DEBUG"
"""Environment variable that makes parsers raise instead of explain; the flag --traceback sets it."""

VERBS = {
    "prepare": "make a manifest of recordings and texts: speech tokens, speaker vectors",
    "sample": "speak every sentence several times with the policy: candidates",
    "judge": "listen to candidates and write down error rates and readings",
    "label": "turn judged candidates into desirable and undesirable rows, and pairs",
    "fit": "train the policy with an objective; goes on where it stopped, and tests at the end",
    "validate": "loss and metrics on the held-out rows",
    "test": "speak the test sentences before and after, judge, and write table, figures and audio",
    "export": "write the trained policy as a model directory, CosyVoice's or vLLM's, and read it back",
    "predict": "score the held-out rows, for a callback of yours",
    "demo build": "build the embedded corpus and its models again",
}
"""Every verb, in the order in which they are used, with the line that --help shows."""

USAGE = """\
usage: tts-align VERB [options]

Makes a speech language model say what is written: from its own good and bad speech.

{verbs}

`tts-align VERB --help` explains a verb, `tts-align fit --objective.help tkto` an objective.
A recipe holds the options: tts-align fit --config recipes/tkto.yaml
  several --config, and flags after them, override what came before; --print_config shows the result
  a run lives in runs/<name of the recipe>/; its config.yaml is a recipe again
  --ckpt_path gives weights and progress only: the recipe and flags always decide everything else
  --traceback shows where in the code an error came from
"""


def usage() -> str:
    """What ``tts-align --help`` prints; needs none of the libraries."""
    return USAGE.format(verbs="\n".join(f"  {verb:12}{line}" for verb, line in VERBS.items()))


@contextmanager
def plain_errors() -> Iterator[None]:
    """Report what a user can mend in a few lines, and leave the traceback to real faults."""
    from tts_align.cli.recipe import fail, root_cause

    try:
        yield
    except FileNotFoundError as error:
        fail(str(error))
    except ValueError as error:
        cause = root_cause(error)
        if not _is_ours(cause):
            raise
        fail(str(cause))
    except Exception as error:
        if type(error).__name__ != "MisconfigurationException":  # Lightning's word for a wrong recipe
            raise
        fail(str(error))


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised the error, not a library inside it."""
    trace, module = error.__traceback__, ""
    while trace is not None:
        module, trace = trace.tb_frame.f_globals.get("__name__", ""), trace.tb_next
    return module.split(".")[0] == "tts_align"


def run(args: list[str] | None = None) -> AlignCLI:
    """Parse ``args`` (the command line by default), run a verb of the trainer and hand back the parts.

    For tests and notebooks; a verb with several processes needs the command line.

    >>> from tts_align.cli.entry import run
    >>> cli = run(["test", "--config", "recipes/dpo.yaml"])  # doctest: +SKIP
    >>> cli.trainer.callback_metrics  # doctest: +SKIP
    """
    args = list(sys.argv[1:] if args is None else args)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a recipe may name a class in the user's own folder
    from tts_align.cli.lightning import AlignCLI

    if "--traceback" in args:
        os.environ[DEBUG] = "true"
        return AlignCLI([arg for arg in args if arg != "--traceback"])
    with plain_errors():
        return AlignCLI(args)


def prepare(args: list[str]) -> None:
    """The verb ``prepare``: needs no recipe."""
    from tts_align.cli.prepare import Processes, prepare

    _plain_verb("prepare", args, prepare, trainer=Processes)


def label(args: list[str]) -> None:
    """The verb ``label``: needs no model."""
    from tts_align.cli.label import LabelRule, label

    _plain_verb("label", args, label, rule=LabelRule)


def demo(args: list[str]) -> None:
    """The verb ``demo build``."""
    from tts_align.cli.recipe import fail

    if args[:1] != ["build"]:
        fail(f"expected `tts-align demo build`, which would {VERBS['demo build']}")
    from tts_align.cli.demo.build import GateError
    from tts_align.cli.demo.command import build_demo

    try:
        _plain_verb("demo build", args[1:], build_demo)
    except GateError as error:
        fail(str(error))


def _plain_verb(verb: str, args: list[str], function: Callable[..., object], **groups: type | None) -> None:
    """Run a function whose arguments are the verb's options.

    Args:
        verb: its name.
        args: the command line after it.
        function: what it does.
        groups: arguments that are made from options of their own by a class, or left out.
    """
    from tts_align.cli.recipe import PlainParser

    summary = (function.__doc__ or "").partition("Args:")[0]
    parser = PlainParser(prog=f"tts-align {verb}", description=cleandoc(summary), allow_abbrev=False)
    parser.add_argument("-c", "--config", action="config", help="YAML file with these options.")
    parser.add_function_arguments(function, skip=set(groups))
    for name, kind in groups.items():
        if kind is not None:
            parser.add_class_arguments(kind, name)
    with nullcontext() if "--traceback" in args else plain_errors():
        options = parser.instantiate(parser.parse_args([arg for arg in args if arg != "--traceback"]))
        options.pop("config", None)
        function(**options)


def main() -> None:
    """Console entry point; returns nothing, because ``sys.exit`` would print what it returns."""
    args = sys.argv[1:]
    verb = args[0] if args else "--help"
    if verb in ("-h", "--help"):
        print(usage(), end="")
    elif verb == "--version":
        from tts_align import __version__

        print(f"tts-align {__version__}")
    elif verb == "prepare":
        prepare(args[1:])
    elif verb == "label":
        label(args[1:])
    elif verb == "demo":
        demo(args[1:])
    elif verb not in VERBS:
        from tts_align.cli.recipe import did_you_mean, fail

        fail(f"unknown verb {verb!r}: expected one of {', '.join(VERBS)}{did_you_mean(verb, list(VERBS))}")
    else:
        run()

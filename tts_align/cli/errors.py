# SPDX-License-Identifier: Apache-2.0
"""What a user can mend is said in a few lines; only real faults keep their traceback."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from tts_align.cli.own_code import own_place
from tts_align.utils import signals
from tts_align.utils.readers import described

DEBUG = "JSONARGPARSE_DEBUG"
"""Environment variable that shows where an error came from; the flags --debug and --traceback set it."""
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
"""Environment variables in which launchers number their processes."""


class RecipeError(ValueError):
    """A recipe asks for what cannot be built."""


def fail(message: str, status: int = 2) -> NoReturn:
    """End the program as a parser does after a wrong argument."""
    sys.stderr.write(f"tts-align: error: {message}\n".encode(errors="replace").decode())
    raise SystemExit(status)


def note(message: str) -> None:
    """Tell a person something while standard output belongs to results; once for all processes of a launcher."""
    if all(os.environ.get(name, "0") == "0" for name in RANKS):
        sys.stderr.write(f"{message}\n")
        sys.stderr.flush()


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The nearest known word as a question, or nothing.

    >>> did_you_mean("tkot", ["dpo", "tkto"])
    "; did you mean 'tkto'?"
    """
    return "".join(f"; did you mean {match!r}?" for match in difflib.get_close_matches(word, known, n=1))


def root_cause(error: BaseException) -> BaseException:
    """What an optional argument's constructor said, before the parser wrapped it in what all alternatives said."""
    while error.__cause__ is not None and str(error).startswith("Does not validate against any of the Union subtypes"):
        error = error.__cause__
    return error


def debugging() -> bool:
    """Whether ``--debug`` was given."""
    return os.environ.get(DEBUG, "false").lower() not in ("false", "no", "off", "0", "")


@contextmanager
def plain_errors(faults: bool = False) -> Iterator[None]:
    """Report what a user can mend in a few lines; with ``--debug`` leave it as it is.

    Args:
        faults: also report faults of this package and of libraries in a line, with the place in the code.
    """
    try:
        yield
    except Exception as error:
        if debugging() or isinstance(error, BrokenPipeError):
            raise
        if (text := explained_error(error)) is not None:
            fail(text)
        if not faults:
            raise
        if _interrupted(error):
            signals.stop()
        if (place := own_place(error)) is not None:
            fail(f"{fault(error, place)}\n  it comes from code of yours: --debug shows all of the way", status=1)
        fail(f"{fault(error)}\n  this ought not to happen: --debug shows where it comes from", status=1)


def explained_error(error: Exception) -> str | None:
    """What is to be said of an error that a user can mend; ``None`` for a fault of the program."""
    if isinstance(error, OSError):
        return described(error) if error.errno else str(error)
    cause = root_cause(error)
    if isinstance(error, ValueError) and _is_ours(cause):
        return described(cause) if isinstance(cause, OSError) and cause.errno else str(cause)
    if type(error).__name__ == "MisconfigurationException":  # Lightning's word for a wrong recipe
        return str(error)
    if "parameters that were not used in producing the loss" in str(error):  # by an objective of the user's
        return (
            "some weights that train took no part in the loss of a step, which trainer.strategy ddp does not expect: "
            "set trainer.strategy to ddp_find_unused_parameters_true, or use all weights in each step"
        )
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return f"there is not enough memory: {' '.join(str(error).split())[:300] or 'lower the batch size'}"
    return None


def _interrupted(error: BaseException) -> bool:
    """Whether a signal came while a library was loaded: compiled ones say that their initialisation failed."""
    chain: BaseException | None = error
    while chain is not None and not isinstance(chain, signals.Interrupted):
        chain = chain.__cause__ or chain.__context__
    return chain is not None or (isinstance(error, ImportError) and bool(signals.asked()))


def fault(error: BaseException, place: str = "") -> str:
    """An error in a line, with a place, by default the last one in this package that it came through."""
    trace, place = (None, f" (in {place})") if place else (error.__traceback__, "")
    while trace is not None:
        if str(trace.tb_frame.f_globals.get("__name__", "")).split(".")[0] == "tts_align":
            place = f" (in {trace.tb_frame.f_globals['__name__']}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}{place}"


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised the error, not a library inside it."""
    trace, module = error.__traceback__, ""
    while trace is not None:
        module, trace = trace.tb_frame.f_globals.get("__name__", ""), trace.tb_next
    return module.split(".")[0] == "tts_align"

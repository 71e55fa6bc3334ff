# SPDX-License-Identifier: Apache-2.0
"""Code of the user's own: why a class in it cannot be used, and where in it an error came from."""

from __future__ import annotations

import importlib
import inspect
import re
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARIES = tuple(
    Path(path).resolve()
    for name, path in sysconfig.get_paths().items()
    if name in ("stdlib", "platstdlib", "purelib", "platlib")
)
_INSTALLED = frozenset({"site-packages", "dist-packages"})
"""Folders of libraries wherever they lie: a user's own, those of another environment."""
_GIVEN = re.compile(r"(?:Given value: |class_path'?:? ')([A-Za-z_]\w*(?:\.\w+)+)(?:'|$)", re.MULTILINE)


def own_place(error: BaseException) -> str | None:
    """File and line of the user's own code that an error came from; ``None`` if it came from anywhere else.

    Args:
        error: what was raised.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}, line {error.lineno}"
    place = None
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename.startswith("<"):
            continue
        path = Path(frame.filename).resolve()
        if path.is_relative_to(_PACKAGE):
            place = None
        elif not any(path.is_relative_to(library) for library in _LIBRARIES) and _INSTALLED.isdisjoint(path.parts):
            place = f"{path.name}, line {frame.lineno}"
    return place


def unusable(message: str) -> str | None:
    """Why a class of the user's that a parser refuses cannot be used; ``None`` if that is not the reason.

    Args:
        message: what the parser says.
    """
    key = next(iter(re.findall(r'Parser key "([\w.]+)":', message)[::-1]), "")
    for path in _GIVEN.findall(message):
        if (why := next(_faults(path), None)) is not None:
            return f"{key}: {path} {why}" if key else f"{path} {why}"
    return None


def _faults(path: str) -> Iterator[str]:
    module, _, name = path.rpartition(".")
    if module.partition(".")[0] in ("tts_align", "torch", "lightning"):
        return
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError:  # which is said by its name
        return
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        yield f"cannot be imported: {said} ({own_place(error) or module})"
        return
    if inspect.isclass(found) and inspect.isabstract(found):
        lacking = sorted(getattr(found, "__abstractmethods__", ()))
        yield f"lacks what a class of its kind must define: {', '.join(lacking)}"

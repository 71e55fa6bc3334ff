# SPDX-License-Identifier: Apache-2.0
"""A process that is killed at its n-th change of the file system, and from then on changes nothing any more."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tts_align.utils import files

CHANGES = ((os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (pathlib.Path, "write_text"))


class Killed(BaseException):
    """Nothing catches it, and no clean-up comes through."""


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """Within the block the change of number ``step`` and all later ones do not happen."""
    calls = 0

    def dying(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > step:
                raise Killed
            return change(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for where, name in (*CHANGES, (files, "_swapped")):
            if hasattr(where, name):
                patch.setattr(where, name, dying(getattr(where, name)))
        yield

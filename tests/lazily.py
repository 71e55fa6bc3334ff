# SPDX-License-Identifier: Apache-2.0
"""Checks of shapes and types, made ready when a function is called for the first time: most are not, in one worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import beartype


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """What :func:`beartype.beartype` makes of a function, made when it is called."""
    made: list[Callable[..., Any]] = []

    def call(*given: Any, **named: Any) -> Any:
        if not made:
            made.append(beartype(function))
        return made[0](*given, **named)

    return call

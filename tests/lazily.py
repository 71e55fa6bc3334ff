# SPDX-License-Identifier: Apache-2.0
"""Checks of shapes and types, made ready when a function is called for the first time: most are not, in one worker.

jaxtyping's import hook puts :func:`jaxtyped` around every function of the package. jaxtyping's own checks the arguments
twice and binds them once per call; here beartype checks them once, within the scope in which jaxtyping remembers sizes.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import types
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype.vale import Is
from jaxtyping import AbstractArray, config

jaxtyping_own = jaxtyping.jaxtyped


def install() -> None:
    """Use the checks of this file wherever jaxtyping's import hook puts its own."""
    jaxtyping.jaxtyped = jaxtyped


def jaxtyped(checked: Any = None, *, typechecker: Callable[..., Any] | None = None) -> Any:
    """Check the arguments and the result of a function, or what a dataclass is made of, unless checks are switched off.

    Args:
        checked: function or class.
        typechecker: that of jaxtyping's import hook.
    """
    if checked is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if inspect.isclass(checked):
        if dataclasses.is_dataclass(checked) and not hasattr(checked.__init__, "_is_checked"):
            checked.__init__ = jaxtyped(checked.__init__, typechecker=typechecker)  # type: ignore[method-assign]
        return checked
    if not inspect.isfunction(checked):  # a property, or the like
        return jaxtyping_own(checked, typechecker=typechecker)
    made: list[Callable[..., Any]] = []

    @functools.wraps(checked)
    def call(*given: Any, **named: Any) -> Any:
        if config.jaxtyping_disable:
            return checked(*given, **named)
        if not made:
            made.append(_checking(checked, typechecker))
        return made[0](*given, **named)

    call._is_checked = True  # type: ignore[attr-defined]
    return call


def _checking(function: types.FunctionType, typechecker: Callable[..., Any] | None) -> Callable[..., Any]:
    """A function that checks: with a scope of sizes where its annotations have shapes, without one elsewhere."""
    hints = {name: _resolved(hint, function) for name, hint in function.__annotations__.items()}
    arrays = [one for hint in hints.values() for one in _arrays(hint)]
    if any("{" in one.dim_str for one in arrays):  # sizes that an argument gives: theirs knows the arguments
        return jaxtyping_own(function, typechecker=typechecker)
    plain = _with_hints(function, hints)
    return _scoped(plain) if arrays else plain


def _resolved(hint: Any, function: types.FunctionType) -> Any:
    """An annotation that was postponed; anything where only a type checker knows its names, as jaxtyping has it."""
    try:
        holder = types.SimpleNamespace(__annotations__={"one": hint})
        return _looking_inside(typing.get_type_hints(holder, function.__globals__, include_extras=True)["one"])
    except (NameError, AttributeError):
        return Any


def _looking_inside(hint: Any) -> Any:
    """An annotation whose protocols find the parts of a module, which ``isinstance`` has not seen since Python 3.12."""
    if inspect.isclass(hint) and getattr(hint, "_is_protocol", False):
        kinds = [one for one in hint.__mro__ if getattr(one, "_is_protocol", False) and one is not typing.Protocol]
        names = {name for one in kinds for name in (*one.__annotations__, *vars(one)) if not name.startswith("_")}
        found = Is[lambda value: all(hasattr(value, name) for name in names)]
        return typing.Annotated[object, found] if names else hint
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return functools.reduce(operator.or_, map(_looking_inside, typing.get_args(hint)))
    return hint


def _arrays(hint: Any) -> list[Any]:
    """jaxtyping's annotations within an annotation."""
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return [hint]
    return [one for inner in typing.get_args(hint) for one in _arrays(inner)]


def _with_hints(function: types.FunctionType, hints: dict[str, Any]) -> Callable[..., Any]:
    """What beartype makes of a copy of the function that has these annotations."""
    from beartype import beartype

    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__, copy.__qualname__, copy.__module__ = (
        function.__kwdefaults__,
        function.__qualname__,
        function.__module__,
    )
    copy.__annotations__ = hints
    return beartype(copy)


def _scoped(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function in whose call each name of a size means one number."""

    def call(*given: Any, **named: Any) -> Any:
        with jaxtyping_own("context"):
            return function(*given, **named)

    return call

# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and SIGINT: what is in progress is finished and kept, then the process ends with 128 plus their number.

A command that works item by item does so within :func:`finishing`, and calls :func:`check` after each item; anything
else ends where it is. A second signal, two seconds later or more, ends everything where it is.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

HANDLED = (signal.SIGTERM, signal.SIGINT)
_AGAIN_SECONDS = 2.0
"""Whoever stops a group of processes may send the signal to each of them more than once."""


class Interrupted(SystemExit):
    """The process was asked to end.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number

    def __str__(self) -> str:
        return f"interrupted by {signal.Signals(self.number).name}"


class _State:
    """What this process was asked, and whether it finishes something."""

    asked = 0
    when = 0.0
    depth = 0
    process = 0
    tell: Callable[[int], None] | None = None
    share: Callable[[int], int] | None = None


@contextmanager
def handled() -> Iterator[None]:
    """Within the block signals are handled as this module says; before and after it as they were before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in HANDLED}
    _State.asked, _State.depth, _State.process, _State.tell = 0, 0, os.getpid(), None
    install()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        _State.asked = _State.process = 0


def install() -> None:
    """Handle the signals again, if they were handled here and a library has taken them over."""
    if _State.process == os.getpid() and threading.current_thread() is threading.main_thread():
        for number in HANDLED:
            signal.signal(number, _handle)


def forward(tell: Callable[[int], None] | None) -> None:
    """Also tell others, such as processes that this one has started, of the first signal."""
    _State.tell = tell


def share(number: Callable[[int], int] | None) -> None:
    """Ask others, such as processes that share the work, at every :func:`check`.

    Args:
        number: given the number of the signal that this process got, 0 for none, gives that which any of them got.
    """
    _State.share = number


def _handle(number: int, _: FrameType | None) -> None:
    if os.getpid() != _State.process:
        return  # a worker that was forked: its parent tells it when to end
    if not _State.asked:
        _State.asked, _State.when = number, time.monotonic()
        if _State.tell is not None:
            _State.tell(number)
        if not _State.depth:
            stop()
        # Not through sys.stderr, which may be in the middle of a write.
        os.write(2, f"\n{signal.Signals(number).name}: finishing what is in progress\n".encode())
    elif time.monotonic() - _State.when > _AGAIN_SECONDS:
        stop()


@contextmanager
def finishing() -> Iterator[None]:
    """Within the block a signal waits until :func:`check` is called, or until the block ends well."""
    begin()
    try:
        yield
    finally:
        end()
    if not _State.depth:
        check()


def begin() -> None:
    """Begin something that is finished before the process ends; see :func:`finishing`."""
    _State.depth += 1


def end() -> None:
    """It is finished."""
    _State.depth = max(0, _State.depth - 1)


@contextmanager
def at_once() -> Iterator[None]:
    """Within the block, which may lie in one of :func:`finishing`, a signal ends everything where it is.

    Where processes share the work, it still waits for a check: the others would wait for this one.
    """
    depth = _State.depth
    _State.depth = 0 if _State.share is None else depth
    try:
        check()
        yield
    finally:
        _State.depth = depth


def asked() -> int:
    """Number of the signal that this process got, 0 before."""
    return _State.asked


def check() -> None:
    """End the process if it was asked to: the item before is finished and kept.

    Raises:
        Interrupted: it was, or one of those that share its work.
    """
    if look():
        stop()


def look() -> int:
    """Number of the signal that this process, or one of those that share its work, got; 0 before.

    For whoever has to meet the others before it ends: see :func:`tts_align.utils.agreement.together`.
    """
    if _State.share is not None:
        ask(_State.share(_State.asked))
    return _State.asked


def ask(number: int) -> None:
    """Be asked to end by another process of the same run, which got the signal.

    Args:
        number: of the signal; 0 for none.
    """
    _State.asked = _State.asked or number


def stop() -> NoReturn:
    """End the process as the signal that it got asks."""
    raise Interrupted(_State.asked)

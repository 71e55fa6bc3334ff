# SPDX-License-Identifier: Apache-2.0
"""One kind of progress bar for everything: drawn live in a terminal, a line now and then in a file or pipe.

Bars go to standard error, results to standard output.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 15.0


class Bar(tqdm):
    """A progress bar that can be handed on as a callback."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.live, self.disable = sys.stderr.isatty(), True
        pause = {"mininterval": 0.5} if self.live else {"mininterval": _SECONDS_BETWEEN_LINES, "miniters": 1}
        self._shown: float = options.get("initial", 0)
        super().__init__(*args, **{"dynamic_ncols": self.live, "file": sys.stderr, **pause, **options})

    def advance(self, count: int) -> None:
        """Add to what is done."""
        self.update(count)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the bar, or write it as a line if there is anything new."""
        if self.live:
            super().display(msg, pos)
        elif self.n > self._shown:
            self._shown = self.n
            self.fp.write(f"{self}\n")
            self.fp.flush()

    def clear(self, nolock: bool = False) -> None:
        """Make room for a line of text; lines in a file stay."""
        if self.live:
            super().clear(nolock)

    def close(self) -> None:
        """Draw the bar for the last time, and end its line."""
        if self.live or self.disable:
            super().close()
            return
        self.disable = True
        self._decr_instances(self)
        self.display()


def bar(total: int | None, done: int, what: str, rank: int = 0, unit: str = "utt", leave: bool = True) -> Bar:
    """A progress bar with rate and time left.

    Args:
        total: how many there are, if that is known.
        done: how many of them were there already.
        what: is counted.
        rank: number of the process; only process 0 draws.
        unit: of what is counted.
        leave: whether a live bar stays on the screen at its end.
    """
    return Bar(total=total, initial=done, desc=what, unit=unit, smoothing=0.1, disable=rank != 0, leave=leave)


@contextmanager
def above_bars(file: Any = None) -> Iterator[None]:
    """What is written within the block starts on a line of its own, and live bars are drawn again behind it.

    Args:
        file: where it is written; standard output by default.
    """
    with tqdm.external_write_mode(file=sys.stdout if file is None else file):
        yield

# SPDX-License-Identifier: Apache-2.0
"""Progress bars of commands: rate and time left."""

from __future__ import annotations

import sys

from tqdm import tqdm


class Bar(tqdm):
    """A progress bar that can be handed on as a callback."""

    def advance(self, count: int) -> None:
        """So many more are done."""
        self.update(count)


def bar(total: int, done: int, what: str, rank: int = 0) -> Bar:
    """A progress bar with rate and time left: live in a terminal, a line now and then in a file.

    Args:
        total: how many there are.
        done: how many of them were there already.
        what: is counted.
        rank: only process 0 draws.
    """
    live = sys.stderr.isatty()
    return Bar(
        total=total,
        initial=done,
        desc=what,
        unit="utt",
        smoothing=0.1,
        disable=rank != 0,
        dynamic_ncols=live,
        mininterval=0.5 if live else 15.0,
    )

# SPDX-License-Identifier: Apache-2.0
"""What the verbs need of a module: its policy, how it samples, and what turns codes into sound and listens."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from tqdm import tqdm

from tts_align.judges.base import Judge
from tts_align.models.base import CodecLM, Sampling, Vocoder


@runtime_checkable
class SpeaksAndListens(Protocol):
    """Attributes of an ``AlignModule`` that sampling and judging use."""

    policy: CodecLM
    sampling: Sampling
    vocoder: Vocoder | None
    judge: Judge | None


@dataclass
class Parts:
    """The same without a module around them."""

    policy: CodecLM
    judge: Judge | None
    sampling: Sampling
    vocoder: Vocoder | None = None


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

# SPDX-License-Identifier: Apache-2.0
"""Protocols by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from tts_align.evaluation.protocols.base import Protocol, Reference, TextScore
from tts_align.evaluation.protocols.counts import ErrorCounts, Rates, aggregate, count_errors
from tts_align.evaluation.protocols.jkyb import JKYB
from tts_align.evaluation.protocols.kana import Kana
from tts_align.evaluation.protocols.pinyin import Pinyin
from tts_align.evaluation.protocols.seed import CV3, Seed
from tts_align.evaluation.protocols.whisper import Whisper

__all__ = [
    "PROTOCOLS",
    "ErrorCounts",
    "Protocol",
    "Rates",
    "Reference",
    "TextScore",
    "aggregate",
    "count_errors",
    "find_protocol",
]

PROTOCOLS: dict[str, Callable[[], Protocol]] = {kind.name: kind for kind in (Seed, CV3, Whisper, Kana, Pinyin, JKYB)}
"""Protocols by the name that a recipe or option gives."""


def find_protocol(name: str) -> Protocol:
    """The protocol of a name; ``whisper:PATH`` is ``whisper`` with the spelling map of a Whisper model's folder.

    Args:
        name: as a recipe or option gives it.

    Raises:
        ValueError: there is none of that name.

    >>> find_protocol("seed").headline
    'macro'
    """
    known, separator, path = name.partition(":")
    if separator and known == Whisper.name:
        return Whisper(path)
    if name not in PROTOCOLS:
        near = "".join(f"; did you mean {one!r}?" for one in difflib.get_close_matches(name, PROTOCOLS, 1))
        raise ValueError(f"unknown protocol {name!r}: expected one of {', '.join(PROTOCOLS)}{near}")
    return PROTOCOLS[name]()

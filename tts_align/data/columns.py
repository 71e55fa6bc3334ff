# SPDX-License-Identifier: Apache-2.0
"""Single columns of a raw row, as JSON or Parquet gives them, checked: each adds what is wrong to a list of faults."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

from tts_align.data.records import Span

MOST_TOKEN = 2**31 - 1
"""Largest speech token where no codebook is known: what Parquet files of ours hold."""
SOUND = "expected a list of speech tokens, a path, or {speech: speech tokens, audio: path}"


def string(given: Mapping[str, Any], name: str, faults: list[str]) -> str:
    """A column of text, empty when it is absent."""
    value = given.get(name, "")
    if not isinstance(value, str):
        faults.append(f"{name}: expected a string, got {value!r:.60}")
        return ""
    return value


def read_codes(speech: Any, limit: int | None) -> tuple[tuple[int, ...], str | None]:
    """Speech tokens and, if they are none, why.

    Args:
        speech: what the file holds.
        limit: size of the codebook, if known.
    """
    if not isinstance(speech, (list, tuple)):
        return (), f"{SOUND}, got {speech!r:.60}"
    if not speech:
        return (), "is empty: expected at least one token"
    if not set(map(type, speech)) <= {int}:
        odd = next(code for code in speech if type(code) is not int)
        return (), f"expected whole numbers, got {odd!r:.60}"
    low, high, most = min(speech), max(speech), MOST_TOKEN if limit is None else limit - 1
    if low < 0 or high > most:
        allowed = "must not be negative" if limit is None and low < 0 else f"must lie in 0..{most}"
        return (), f"speech tokens {allowed}, got {low}..{high}: were they made by another tokenizer?"
    return tuple(speech), None


def read_spans(raw: Any, text: str, faults: list[str]) -> tuple[Span, ...]:
    """Marked places of a text."""
    if not isinstance(raw, (list, tuple)) or not all(isinstance(span, dict) for span in raw):
        faults.append(f"spans: expected a list of {{start, end, right, wrong}}, got {raw!r:.80}")
        return ()
    spans = []
    for span in raw:
        odd = span.keys() - {"start", "end", "right", "wrong"}
        start, end = span.get("start"), span.get("end")
        readings = [span.get(name) or () for name in ("right", "wrong")]
        if odd or not (type(start) is int and type(end) is int):
            faults.append(f"spans: expected {{start, end, right, wrong}}, got {span!r:.80}")
        elif not 0 <= start < end <= len(text):
            faults.append(f"spans: {start}..{end} lies outside the text, which has {len(text)} characters")
        elif not all(isinstance(r, (list, tuple)) and all(isinstance(kana, str) for kana in r) for r in readings):
            faults.append(f"spans: right and wrong must be lists of readings, got {span!r:.80}")
        else:
            spans.append(Span(start, end, tuple(readings[0]), tuple(readings[1])))
    return tuple(spans)


def read_scores(raw: Any, faults: list[str]) -> dict[str, float]:
    """A finite number for each name."""
    pairs = _items(raw)
    if pairs is None or any(type(value) not in (int, float) for value in pairs.values()):
        faults.append(f"scores: expected a number for each name, got {raw!r:.80}")
        return {}
    odd = [f"{name} is {value!r:.40}" for name, value in pairs.items() if _is_infinite(value)]
    if odd:
        faults.append(f"scores: expected finite numbers, but {', '.join(odd)}; leave out what was not measured")
        return {}
    return {name: float(value) for name, value in pairs.items()}


def read_notes(raw: Any, faults: list[str]) -> dict[str, str]:
    """Words for each name."""
    pairs = _items(raw)
    if pairs is None or not all(isinstance(value, str) for value in pairs.values()):
        faults.append(f"notes: expected words for each name, got {raw!r:.80}")
        return {}
    return pairs


def read_attributes(raw: Any, faults: list[str]) -> dict[str, str | float]:
    """Words or a number for each name; Parquet, where a column has one type, holds ``{word, number}`` for each."""
    pairs = _items(raw)
    values = {name: _only(value) for name, value in (pairs or {}).items()}
    odd = [value for value in values.values() if type(value) not in (str, int, float)]
    if pairs is None or odd:
        faults.append(f"attributes: expected words or a number for each name, got {odd[0] if odd else raw!r:.80}")
        return {}
    numbers = {name: value for name, value in values.items() if not isinstance(value, str)}
    infinite = [f"{name} is {value!r:.40}" for name, value in numbers.items() if _is_infinite(value)]
    if infinite:
        faults.append(f"attributes: expected finite numbers, but {', '.join(infinite)}; leave out what is not known")
        return {}
    return {**values, **{name: float(value) for name, value in numbers.items()}}


def _only(value: Any) -> Any:
    """What stands under ``word`` or ``number``, whichever is there."""
    if not isinstance(value, dict):
        return value
    there = [inner for name, inner in value.items() if inner is not None and name in ("word", "number")]
    return there[0] if len(there) == 1 else value


def read_vector(raw: Any, faults: list[str]) -> tuple[float, ...]:
    """A speaker vector; an empty one counts as absent."""
    if not isinstance(raw, (list, tuple)) or not set(map(type, raw)) <= {int, float}:
        faults.append(f"speaker_vector: expected a list of numbers, got {raw!r:.60}")
        return ()
    if any(map(_is_infinite, raw)):
        faults.append("speaker_vector: expected finite numbers, got others")
        return ()
    return tuple(map(float, raw))


def _is_infinite(value: int | float) -> bool:
    """Whether a number is none, or larger than a float can be."""
    return not abs(value) <= sys.float_info.max


def _items(raw: Any) -> dict[str, Any] | None:
    """A mapping without its absent values; Parquet gives maps as lists of pairs."""
    try:
        return {name: value for name, value in dict(raw).items() if value is not None}
    except (TypeError, ValueError):
        return None


LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{1,8})*")
"""A BCP 47 code: a language of two or three letters, and what kind of it."""


def read_language(given: Mapping[str, Any], faults: list[str]) -> str:
    """The column of the language, a BCP 47 code; empty when it is absent."""
    value = string(given, "language", faults)
    if value and not LANGUAGE.fullmatch(value):
        faults.append(f"language: expected a code such as ja, en-US or zh-Hant, got {value!r:.60}")
        return ""
    return value

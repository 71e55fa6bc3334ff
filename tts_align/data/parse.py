# SPDX-License-Identifier: Apache-2.0
"""One raw row, as JSON or Parquet gives it, into a :class:`Row`, with every fault in it named."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from tts_align.data.records import Pair, Row, Sound, Span

COLUMNS = ("id", "text", "language", "speaker", "speech", "audio", "label", "pair", "spans", "scores", "notes")
TRL = ("prompt", "completion", "chosen", "rejected")
"""Other names that are understood: those of TRL's data sets."""

_LABELS: Mapping[Any, bool] = {True: True, False: False, "desirable": True, "undesirable": False}
_SOUND = "expected a list of codes, a path, or {speech: codes, audio: path}"


class Rules(NamedTuple):
    """What rows are checked against.

    Args:
        codes: size of the codebook; ``None`` when not known.
        audio_fault: says what is wrong with a recording, or nothing.
    """

    codes: int | None = None
    audio_fault: Callable[[str], str | None] = lambda _: None


def parse(raw: object, default_id: str, rules: Rules) -> tuple[Row | None, list[str], set[str]]:
    """Check one raw row.

    Args:
        raw: what the file holds.
        default_id: used when the row has none.
        rules: what else to check against.

    Returns:
        The row if nothing is wrong, the faults, and the names of columns that are not known.
    """
    if not isinstance(raw, dict):
        return None, [f"expected an object with columns, got {type(raw).__name__}"], set()
    given = {name: value for name, value in raw.items() if value is not None}
    faults: list[str] = []
    unknown = _unknown(given, faults)
    text = _text(given, faults)
    sound, pair = _content(given, rules, faults)
    label = given.get("label")
    if label is not None and (not isinstance(label, (bool, int, str)) or label not in _LABELS):
        faults.append(f"label: expected true, false, 1, 0, desirable or undesirable, got {label!r}")
        label = None
    if pair is not None and label is not None:
        faults.append("a pair takes no label: chosen is desirable, rejected is not")
    identity = given.get("id", default_id)
    if not isinstance(identity, (str, int)) or identity == "":
        faults.append(f"id: expected a string, got {identity!r}")
    row = Row(
        id=str(identity),
        text=text,
        language=_string(given, "language", faults),
        speaker=_string(given, "speaker", faults),
        speech=sound.speech,
        audio=sound.audio,
        desirable=None if label is None else _LABELS[label],
        pair=pair,
        spans=_spans(given.get("spans", ()), text, faults),
        scores=_scores(given.get("scores", {}), faults),
        notes=_notes(given.get("notes", {}), faults),
    )
    return (None if faults else row), faults, unknown


def _unknown(given: Mapping[str, Any], faults: list[str]) -> set[str]:
    unknown = given.keys() - _KNOWN
    for name in sorted(unknown):
        near = difflib.get_close_matches(name, _KNOWN, 1, cutoff=0.8)
        if near:
            faults.append(f"unknown column {name!r}: did you mean {near[0]!r}?")
    return unknown


_KNOWN: Collection[str] = frozenset(COLUMNS + TRL)


def _either(given: Mapping[str, Any], ours: str, theirs: str, faults: list[str]) -> Any:
    if ours in given and theirs in given:
        faults.append(f"{ours} and {theirs} mean the same: give one of them")
    return given.get(ours, given.get(theirs))


def _string(given: Mapping[str, Any], name: str, faults: list[str]) -> str:
    value = given.get(name, "")
    if not isinstance(value, str):
        faults.append(f"{name}: expected a string, got {value!r}")
        return ""
    return value


def _text(given: Mapping[str, Any], faults: list[str]) -> str:
    text = _either(given, "text", "prompt", faults)
    if not isinstance(text, str) or not text.strip():
        faults.append("text is missing" if text is None else f"text: expected words, got {text!r}")
        return ""
    return text


def _content(given: Mapping[str, Any], rules: Rules, faults: list[str]) -> tuple[Sound, Pair | None]:
    """The utterance, or an empty one and the pair."""
    speech = _either(given, "speech", "completion", faults)
    single = speech is not None or "audio" in given
    pair = given.get("pair")
    if "chosen" in given or "rejected" in given:
        if pair is not None:
            faults.append("give either pair, or chosen and rejected")
        pair = {name: given.get(name) for name in ("chosen", "rejected")}
    if pair is not None and single:
        faults.append("a row holds either one utterance (speech, audio) or a pair, not both")
    if pair is not None:
        return Sound(), _pair(pair, rules, faults)
    if not single:
        faults.append("no utterance: expected speech (codes), audio (a path) or a pair")
        return Sound(), None
    whole = speech if isinstance(speech, str) else {"speech": speech, "audio": given.get("audio")}
    return _sound(whole, "speech", rules, faults), None


def _pair(raw: Any, rules: Rules, faults: list[str]) -> Pair | None:
    sides = [raw.get(name) for name in ("chosen", "rejected")] if isinstance(raw, dict) else [None]
    if any(side is None for side in sides):
        faults.append(f"pair: expected chosen and rejected, got {raw!r:.80}")
        return None
    before = len(faults)
    chosen, rejected = (_sound(s, name, rules, faults) for s, name in zip(sides, ("chosen", "rejected"), strict=True))
    if len(faults) == before and _same(chosen, rejected):
        faults.append("chosen and rejected are the same: there is nothing to prefer")
    return Pair(chosen, rejected)


def _same(one: Sound, other: Sound) -> bool:
    if one.speech and other.speech:
        return one.speech == other.speech
    return bool(one.audio) and one.audio == other.audio


def _sound(raw: Any, name: str, rules: Rules, faults: list[str]) -> Sound:
    if isinstance(raw, str):
        raw = {"audio": raw}
    elif not isinstance(raw, dict):
        raw = {"speech": raw}
    speech, audio = raw.get("speech"), raw.get("audio")
    codes: tuple[int, ...] = ()
    if speech is not None:
        codes, fault = _codes(speech, rules.codes)
        if fault:
            faults.append(f"{name}: {fault}")
    if audio is not None and (not isinstance(audio, str) or not audio):
        faults.append(f"{name}: expected the path of a recording, got {audio!r}")
    elif audio is not None and (fault := rules.audio_fault(audio)):
        faults.append(f"{name}: {fault}")
    if speech is None and audio is None:
        faults.append(f"{name}: {_SOUND}")
    return Sound(codes, audio if isinstance(audio, str) else "")


def _codes(speech: Any, limit: int | None) -> tuple[tuple[int, ...], str | None]:
    if not isinstance(speech, (list, tuple)):
        return (), f"{_SOUND}, got {speech!r:.60}"
    if not speech:
        return (), "is empty: expected at least one code"
    if not set(map(type, speech)) <= {int}:
        odd = next(code for code in speech if type(code) is not int)
        return (), f"expected whole numbers, got {odd!r}"
    low, high = min(speech), max(speech)
    if low < 0 or high >= (math.inf if limit is None else limit):
        allowed = "must not be negative" if limit is None else f"must lie in 0..{limit - 1}"
        return (), f"codes {allowed}, got {low}..{high}: were they made by another tokenizer?"
    return tuple(speech), None


def _spans(raw: Any, text: str, faults: list[str]) -> tuple[Span, ...]:
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


def _scores(raw: Any, faults: list[str]) -> dict[str, float]:
    pairs = _items(raw)
    if pairs is None or any(type(value) not in (int, float) for value in pairs.values()):
        faults.append(f"scores: expected a number for each name, got {raw!r:.80}")
        return {}
    odd = [f"{name} is {value}" for name, value in pairs.items() if not math.isfinite(value)]
    if odd:
        faults.append(f"scores: expected finite numbers, but {', '.join(odd)}; leave out what was not measured")
    return {name: float(value) for name, value in pairs.items()}


def _notes(raw: Any, faults: list[str]) -> dict[str, str]:
    pairs = _items(raw)
    if pairs is None or not all(isinstance(value, str) for value in pairs.values()):
        faults.append(f"notes: expected words for each name, got {raw!r:.80}")
        return {}
    return pairs


def _items(raw: Any) -> dict[str, Any] | None:
    """A mapping without its absent values; Parquet gives maps as lists of pairs."""
    try:
        return {name: value for name, value in dict(raw).items() if value is not None}
    except (TypeError, ValueError):
        return None

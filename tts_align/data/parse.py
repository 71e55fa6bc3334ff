# SPDX-License-Identifier: Apache-2.0
"""One raw row, as JSON or Parquet gives it, into a :class:`Row`, with every fault in it named."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from tts_align.data.columns import (
    SOUND,
    read_attributes,
    read_codes,
    read_language,
    read_notes,
    read_scores,
    read_spans,
    read_vector,
    string,
)
from tts_align.data.labels import read_label
from tts_align.data.records import Pair, Row, Sound

COLUMNS = (
    *("id", "text", "language", "speaker", "speech", "audio", "label", "pair", "spans", "scores", "notes"),
    *("instruct", "prompt_text", "prompt_speech", "prompt_audio", "speaker_vector", "attributes", "transcript"),
)
TRL = ("prompt", "completion", "chosen", "rejected")
"""Other names that are understood: those of TRL's data sets."""


class Rules(NamedTuple):
    """What rows are checked against.

    Args:
        codebook_size: size of the codebook; ``None`` when not known.
        audio_fault: says what is wrong with a recording, or nothing.
        unprepared: take what only ``tts-align prepare`` can use.
        desirable_stars: number of stars from which on a row is desirable; ``None`` when labels are no stars.
        needed_audio_only: look for faults only in recordings of utterances without speech tokens.
    """

    codebook_size: int | None = None
    audio_fault: Callable[[str], str | None] = lambda _: None
    unprepared: bool = False
    desirable_stars: float | None = None
    needed_audio_only: bool = False


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
    prompt = _prompt(given, rules, faults)
    label = _label(given, rules, faults)
    if pair is not None and label is not None:
        faults.append("a pair takes no label: chosen is desirable, rejected is not")
    identity = given.get("id", default_id)
    if not isinstance(identity, (str, int)) or identity == "":
        faults.append(f"id: expected a string, got {identity!r:.60}")
    row = Row(
        id=str(identity),
        text=text,
        language=read_language(given, faults),
        speaker=string(given, "speaker", faults),
        speech=sound.speech,
        audio=sound.audio,
        desirable=label,
        pair=pair,
        spans=read_spans(given.get("spans", ()), text, faults),
        scores=read_scores(given.get("scores", {}), faults),
        notes=read_notes(given.get("notes", {}), faults),
        instruct=string(given, "instruct", faults),
        prompt_text=prompt.text,
        prompt_speech=prompt.sound.speech,
        prompt_audio=prompt.sound.audio,
        speaker_vector=read_vector(given.get("speaker_vector", ()), faults),
        attributes=read_attributes(given.get("attributes", {}), faults),
        transcript=string(given, "transcript", faults),
    )
    return (None if faults else row), faults, unknown


def _unknown(given: Mapping[str, Any], faults: list[str]) -> set[str]:
    unknown = given.keys() - KNOWN - SPOKEN
    for name in sorted(unknown):
        near = difflib.get_close_matches(name, KNOWN, 1, cutoff=0.8)
        if near:
            faults.append(f"unknown column {name!r}: did you mean {near[0]!r}?")
    return unknown


KNOWN: Collection[str] = frozenset(COLUMNS + TRL)
SPOKEN = frozenset({"transcripts", "right", "sentence", "sample", "seed", "finished", "made_with"})
"""Columns of what ``sample`` writes: with a label added to each line, that is a manifest as it is."""


def _either(given: Mapping[str, Any], ours: str, theirs: str, faults: list[str]) -> Any:
    if ours in given and theirs in given:
        faults.append(f"{ours} and {theirs} mean the same: give one of them")
    return given.get(ours, given.get(theirs))


def _text(given: Mapping[str, Any], faults: list[str]) -> str:
    text = _either(given, "text", "prompt", faults)
    if not isinstance(text, str) or not text.strip():
        faults.append("text is missing" if text is None else f"text: expected words, got {text!r:.60}")
        return ""
    return text


def _label(given: Mapping[str, Any], rules: Rules, faults: list[str]) -> bool | None:
    try:
        return read_label(given.get("label"), rules.desirable_stars)
    except ValueError as error:
        faults.append(str(error))
        return None


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
        faults.append("no utterance: expected speech (speech tokens), audio (a path) or a pair")
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
    speech_tokens: tuple[int, ...] = ()
    if speech is not None:
        speech_tokens, fault = read_codes(speech, rules.codebook_size)
        if fault:
            faults.append(f"{name}: {fault}")
    if audio is not None and (not isinstance(audio, str) or not audio):
        faults.append(f"{name}: expected the path of a recording, got {audio!r:.60}")
    elif audio is not None and not (speech and rules.needed_audio_only) and (fault := rules.audio_fault(audio)):
        faults.append(f"{name}: {fault}")
    if speech is None and audio is None:
        faults.append(f"{name}: {SOUND}")
    return Sound(speech_tokens, audio if isinstance(audio, str) else "")


class _Prompt(NamedTuple):
    """A recording to continue, and its transcript."""

    text: str = ""
    sound: Sound = Sound()


def _prompt(given: Mapping[str, Any], rules: Rules, faults: list[str]) -> _Prompt:
    """What the utterance continues; empty speech tokens count as absent, as Parquet writers have it."""
    text = string(given, "prompt_text", faults)
    raw = {"speech": given.get("prompt_speech") or None, "audio": given.get("prompt_audio") or None}
    if not any(raw.values()):
        if text:
            faults.append("prompt_text has no speech: expected prompt_speech (speech tokens) or prompt_audio (a path)")
        return _Prompt()
    if not text.strip():
        faults.append("prompt_text is missing: expected the transcript of the prompt's speech")
    before = len(faults)
    sound = _sound(raw, "prompt", rules, faults)
    if len(faults) == before and not sound.speech and not rules.unprepared:
        faults.append("prompt_audio has no speech tokens: make prompt_speech of it with `tts-align prepare`")
    return _Prompt(text, sound)

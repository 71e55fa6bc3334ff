# SPDX-License-Identifier: Apache-2.0
"""Speech tokens for rows that have only a recording."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from tts_align.data.records import Fault, Faults, Manifest, ManifestError, Row, Sound
from tts_align.data.table.rows import RowTable
from tts_align.models.base.tokenizer import SpeechTokenizer
from tts_align.utils.audio import AudioError, load_audio
from tts_align.utils.progress import Bar


def missing_codes(rows: Sequence[Row]) -> list[str]:
    """Recordings without speech tokens, each once, in the order of the rows."""
    return list(dict.fromkeys(sound.audio for row in rows for sound in row.sounds if not sound.speech))


def encode_audio(manifest: Manifest, tokenizer: SpeechTokenizer | None, batch_size: int = 16) -> Sequence[Row]:
    """The rows of a manifest, all with speech tokens.

    Args:
        manifest: what was read.
        tokenizer: makes the speech tokens; only needed if rows lack them.
        batch_size: recordings encoded at once.

    Raises:
        ManifestError: rows lack speech tokens and there is no tokenizer, or recordings cannot be used or gave none.
    """
    if isinstance(manifest.rows, RowTable) and manifest.rows.spoken.all():
        return manifest.rows
    todo = missing_codes(manifest.rows)
    if not todo:
        return manifest.rows
    if tokenizer is None:
        what = "has audio only: name a speech tokenizer (data.tokenizer), or add speech tokens with `tts-align prepare`"
        lacking = (row for row in manifest.rows if missing_codes([row]))
        raise ManifestError(manifest.path, Faults(Fault(f"row {row.id!r}", what) for row in lacking))
    tokenizer.eval()
    speech_tokens: dict[str, tuple[int, ...]] = {}
    faults: list[Fault] = []
    for start in Bar(range(0, len(todo), batch_size), desc="encode recordings", unit="batch"):
        sounds = _load(manifest, todo[start : start + batch_size], tokenizer, faults)
        spoken = tokenizer.encode(list(sounds.values())) if sounds else []
        speech_tokens |= {name: tuple(map(int, speech.tolist())) for name, speech in zip(sounds, spoken, strict=True)}
    faults += [
        Fault(str(manifest.find(name)), "too short to give a speech token")
        for name in speech_tokens
        if not speech_tokens[name]
    ]
    if faults:
        raise ManifestError(manifest.path, faults)
    return RowTable.of(_fill(manifest.rows, speech_tokens))


def _fill(rows: Sequence[Row], speech_tokens: dict[str, tuple[int, ...]]) -> Iterator[Row]:
    def filled(sound: Sound) -> Sound:
        return sound if sound.speech else replace(sound, speech=speech_tokens[sound.audio])

    for row in rows:
        if row.pair is not None:
            yield replace(
                row, pair=replace(row.pair, chosen=filled(row.pair.chosen), rejected=filled(row.pair.rejected))
            )
        else:
            yield replace(row, speech=filled(row.sounds[0]).speech)


def _load(
    manifest: Manifest, names: Sequence[str], tokenizer: SpeechTokenizer, faults: list[Fault]
) -> dict[str, Tensor]:
    """The recordings that can be used; what is wrong with the others is added to ``faults``.

    Silence is an utterance too: a model may have said nothing, and be told that this was wrong.
    """
    sounds = {}
    for name in names:
        try:
            path = manifest.find(name)
            sounds[name] = load_audio(path, tokenizer.sample_rate, tokenizer.max_seconds, silent=True)
        except AudioError as error:
            faults.append(Fault(error.name, error.what))
    return sounds

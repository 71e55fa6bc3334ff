# SPDX-License-Identifier: Apache-2.0
"""Speech codes for rows that have only a recording."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from torch import Tensor, from_numpy, nn

from tts_align.data.records import Fault, Manifest, ManifestError, Row, Sound
from tts_align.models.base import SpeechTokenizer


def missing_codes(rows: Sequence[Row]) -> list[str]:
    """Recordings without codes, each once, in the order of the rows."""
    return list(dict.fromkeys(sound.audio for row in rows for sound in row.sounds if not sound.speech))


def encode_audio(manifest: Manifest, tokenizer: SpeechTokenizer | None, batch_size: int = 16) -> tuple[Row, ...]:
    """The rows of a manifest, all with speech codes.

    Args:
        manifest: what was read.
        tokenizer: makes the codes; only needed if rows lack them.
        batch_size: recordings encoded at once.

    Raises:
        ManifestError: rows lack codes and there is no tokenizer, or a recording gave none.
    """
    todo = missing_codes(manifest.rows)
    if not todo:
        return manifest.rows
    if tokenizer is None:
        what = "has audio only: name a speech tokenizer (data.tokenizer), or add codes with `tts-align prepare`"
        lacking = [row for row in manifest.rows if missing_codes([row])]
        raise ManifestError(manifest.path, [Fault(f"row {row.id!r}", what) for row in lacking])
    from rich.progress import track

    tokenizer.eval()
    codes: dict[str, tuple[int, ...]] = {}
    for start in track(range(0, len(todo), batch_size), description="encoding recordings"):
        names = todo[start : start + batch_size]
        spoken = tokenizer.encode([_load(manifest.find(name), tokenizer.sample_rate) for name in names])
        codes |= {name: tuple(map(int, speech.tolist())) for name, speech in zip(names, spoken, strict=True)}
    silent = [Fault(str(manifest.find(name)), "too short to give a speech code") for name in todo if not codes[name]]
    if silent:
        raise ManifestError(manifest.path, silent)
    return tuple(_fill(manifest.rows, codes))


def _fill(rows: Sequence[Row], codes: dict[str, tuple[int, ...]]) -> Iterator[Row]:
    def filled(sound: Sound) -> Sound:
        return sound if sound.speech else replace(sound, speech=codes[sound.audio])

    for row in rows:
        if row.pair is not None:
            yield replace(
                row, pair=replace(row.pair, chosen=filled(row.pair.chosen), rejected=filled(row.pair.rejected))
            )
        else:
            yield replace(row, speech=filled(row.sounds[0]).speech)


def _load(path: Path, sample_rate: int) -> Tensor:
    """One channel at the wanted rate."""
    import soundfile

    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    sound = from_numpy(samples).mean(1)
    return sound if rate == sample_rate else _resampler(rate, sample_rate)(sound)


@lru_cache
def _resampler(old: int, new: int) -> nn.Module:
    from torchaudio.transforms import Resample

    return Resample(old, new)

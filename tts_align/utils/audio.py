# SPDX-License-Identifier: Apache-2.0
"""Recordings in and out: one channel at the wanted rate, or an error that names the file."""

from __future__ import annotations

import io
import math
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from tts_align.utils.files import written_atomically

if TYPE_CHECKING:
    import soundfile

SILENCE = 1e-4
"""A recording that never gets louder holds no sound: -80 dB, three steps of 16 bit."""
LONGEST_SECONDS = 1200.0
"""Longest recording that is read anywhere: a compressed file of a megabyte can hold hours of silence."""
_RATES = (1000, 768_000)
"""Sample rates of recordings, in Hz; a header that says others would make seconds of hours, or hours of seconds."""
_MAX_CHANNELS = 256
_BLOCK_SAMPLES = 2**22
_LARGEST_KERNEL = 2 * 10**7
"""Numbers in a resampler; every rate in use needs far fewer."""


class AudioError(ValueError):
    """A recording that cannot be used.

    Args:
        name: which one.
        what: is wrong with it.
    """

    def __init__(self, name: str, what: str) -> None:
        super().__init__(name, what)
        self.name, self.what = name, what

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


def load_audio(
    path: str | Path,
    sample_rate: int,
    max_seconds: float | None = None,
    lowest_rate: int | None = None,
    silent: bool = False,
) -> Float[Tensor, " time"]:
    """Read a recording: its channels averaged, brought to the wanted rate.

    Args:
        path: of the file, in any format that libsndfile reads (WAV, FLAC, OGG, MP3).
        sample_rate: wanted, in Hz.
        max_seconds: longest recording that is taken; ``None`` for :data:`LONGEST_SECONDS`.
        lowest_rate: lowest rate of the file that is taken, in Hz; ``None`` for any.
        silent: also take a recording without any sound.

    Raises:
        AudioError: the file is missing, unreadable, empty, silent, too long, of too low a rate, or not finite.
    """
    if not Path(path).is_file():
        raise AudioError(str(path), "there is no such recording")
    return _load(str(path), str(path), sample_rate, max_seconds, lowest_rate, silent)


def read_recording(path: str | Path) -> tuple[Float[Tensor, " time"], int]:
    """Read a recording at its own rate, its channels averaged; silence is sound, too.

    Args:
        path: of the file.

    Returns:
        The samples and how many there are in a second.

    Raises:
        AudioError: the file is missing, unreadable, empty, too long, or not finite.
    """
    import soundfile

    try:
        rate = soundfile.info(path).samplerate if Path(path).is_file() else 0
    except (soundfile.LibsndfileError, OSError) as error:
        raise AudioError(str(path), f"cannot be read as sound: {getattr(error, 'error_string', error)}") from None
    return load_audio(path, rate, silent=True), rate


def decode_audio(
    data: bytes,
    name: str,
    sample_rate: int,
    max_seconds: float | None = None,
    lowest_rate: int | None = None,
    silent: bool = False,
) -> Float[Tensor, " time"]:
    """The same as :func:`load_audio`, from the bytes of a file.

    Args:
        data: the file's bytes.
        name: what errors call it.
        sample_rate: wanted, in Hz.
        max_seconds: longest recording that is taken; ``None`` for :data:`LONGEST_SECONDS`.
        lowest_rate: lowest rate of the recording that is taken, in Hz; ``None`` for any.
        silent: also take a recording without any sound.

    Raises:
        AudioError: see :func:`load_audio`.
    """
    return _load(io.BytesIO(data), name, sample_rate, max_seconds, lowest_rate, silent)


def _load(
    source: str | io.BytesIO,
    name: str,
    sample_rate: int,
    max_seconds: float | None,
    lowest_rate: int | None,
    silent: bool,
) -> Float[Tensor, " time"]:
    import soundfile

    try:
        with soundfile.SoundFile(source) as file:
            rate = file.samplerate
            if not _RATES[0] <= rate <= _RATES[1] or not 1 <= file.channels <= _MAX_CHANNELS:
                raise AudioError(
                    name,
                    f"its header says {file.channels} channels of {rate} samples a second, expected at most "
                    f"{_MAX_CHANNELS} of {_RATES[0]} to {_RATES[1]}",
                )
            if lowest_rate is not None and rate < lowest_rate:
                raise AudioError(name, f"has {rate} samples a second, expected at least {lowest_rate}")
            # Before its samples are read: hours of sound, or what only looks like it, need not enter the memory.
            _check_length(name, file.frames, rate, max_seconds)
            mono = _mono(file, name, max_seconds)
    except AudioError:
        raise
    except (soundfile.LibsndfileError, OSError, TypeError, ValueError) as error:
        # The library's own words only: before them it puts the name or, for bytes, an address that is never the same.
        raise AudioError(name, f"cannot be read as sound: {getattr(error, 'error_string', error)}") from None
    _check_length(name, len(mono), rate, max_seconds)
    if not np.isfinite(mono).all():
        raise AudioError(name, "holds samples that are not finite numbers")
    if not silent and np.abs(mono).max() <= SILENCE:
        raise AudioError(name, "is silent")
    sound = torch.from_numpy(mono)
    return sound if rate == sample_rate else resample(sound, rate, sample_rate)


def _mono(file: soundfile.SoundFile, name: str, max_seconds: float | None) -> NDArray[np.float32]:
    """The channels' mean, read piece by piece: what a header says of the length need not be true."""
    pieces, count = [], 0
    while len(block := file.read(max(1, _BLOCK_SAMPLES // file.channels), dtype="float32", always_2d=True)):
        # In double precision: channels that cancel shall leave nothing behind.
        pieces.append(block.mean(axis=1, dtype=np.float64).astype(np.float32))
        count += len(block)
        _check_length(name, count, file.samplerate, max_seconds)
    return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)


def _check_length(name: str, frames: int, rate: int, max_seconds: float | None) -> None:
    if frames <= 0:
        raise AudioError(name, "is empty")
    longest = LONGEST_SECONDS if max_seconds is None else max_seconds
    if frames > longest * rate:
        raise AudioError(name, f"lasts {frames / rate:.1f} s, expected at most {longest:g} s: cut it")


def resample(sound: Float[Tensor, " time"], old: int, new: int) -> Float[Tensor, " new_time"]:
    """The same sound at another rate.

    Args:
        sound: the samples.
        old: their rate, in Hz.
        new: the wanted rate, in Hz.
    """
    step = math.gcd(old, new)
    if (old // step) * (new // step) <= _LARGEST_KERNEL:
        return _cached_resampler(old, new)(sound)
    # Rates with hardly a common factor would need a huge table of filters: through the spectrum of the whole instead,
    # which stretches it by less than a sample.
    length = -(-len(sound) * new // old)
    spectrum = torch.fft.rfft(sound.double())[: length // 2 + 1]
    return (torch.fft.irfft(spectrum, n=length) * (length / len(sound))).to(sound.dtype)


@lru_cache(maxsize=16)
def _cached_resampler(old: int, new: int) -> nn.Module:
    import torch
    from torchaudio.transforms import Resample

    with torch.inference_mode(False):  # what is kept serves trainings, too
        return Resample(old, new)


def write_wav(path: Path, waveform: ArrayLike, sample_rate: int) -> Path:
    """Write a 16-bit WAV file, whole or not at all.

    Args:
        path: of the file.
        waveform: mono sound in [-1, 1], shape (samples,); what lies beyond is clipped.
        sample_rate: in Hz.

    Raises:
        ValueError: the waveform is not one-dimensional, or not finite.
    """
    import soundfile

    samples = np.asarray(waveform, np.float64)
    if samples.ndim != 1 or not np.isfinite(samples).all():
        raise ValueError(f"expected finite samples of one channel, got shape {samples.shape}")
    whole = np.rint(np.clip(samples, -1, 1) * 32767).astype(np.int16)
    content = io.BytesIO()  # what a full disk says is better heard from Python than from the library
    soundfile.write(content, whole, sample_rate, subtype="PCM_16", format="WAV")
    with written_atomically(path, durable=False) as scratch:
        scratch.write_bytes(content.getbuffer())
    return Path(path)

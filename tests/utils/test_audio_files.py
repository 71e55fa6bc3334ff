# SPDX-License-Identifier: Apache-2.0
"""Any recording becomes one channel at the wanted rate, or an error that names it and says what to change."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_align.models.cosyvoice.features import _window
from tts_align.utils.audio import AudioError, _cached_resampler, decode_audio, load_audio, read_recording, write_wav

RATES = [8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000]


def tone(seconds: float, rate: int, hertz: float = 200.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def encoded(samples: np.ndarray, rate: int, kind: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


@settings(max_examples=25, deadline=None)
@given(
    old=st.sampled_from(RATES),
    new=st.sampled_from([16000, 24000]),
    channels=st.integers(1, 6),
    seconds=st.floats(0.1, 0.5),
)
def test_any_rate_and_number_of_channels(old: int, new: int, channels: int, seconds: float):
    sound = tone(seconds, old)
    shares = np.linspace(0, 2, channels) if channels > 1 else np.ones(1)  # their mean is 1
    heard = decode_audio(encoded(sound[:, None] * shares / 2, old, subtype="FLOAT"), "a.wav", new)
    assert heard.dtype == torch.float32
    assert len(heard) == -(-len(sound) * new // old)
    expected = tone(len(heard) / new, new)[: len(heard)] / 2
    inner = slice(new // 50, -new // 50)  # the filter sees zeros beyond the ends
    np.testing.assert_allclose(heard.numpy()[inner], expected[inner], atol=5e-3)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_formats_from_file_and_from_memory(tmp_path: Path, kind: str):
    data = encoded(tone(0.3, 16000), 16000, kind)
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(data)
    assert torch.equal(load_audio(path, 16000), decode_audio(data, "a", 16000))


def test_the_wanted_rate_is_left_alone(tmp_path: Path):
    sound = np.random.default_rng(0).uniform(-1, 1, 100).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", sound, 16000, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav", 16000).numpy(), sound)


FAULTS = [
    (np.zeros(0), 16000, "is empty"),
    (np.zeros(1000), 16000, "is silent"),
    (np.full(1000, 3e-5), 16000, "is silent"),
    (np.stack([tone(0.1, 16000), -tone(0.1, 16000)], 1), 16000, "is silent"),
    (tone(1.5, 16000), 16000, r"lasts 1\.5 s, expected at most 1 s: cut it"),
    (tone(0.1, 8000), 8000, "has 8000 samples a second, expected at least 16000"),
    (np.array([0.1, np.nan, 0.1]), 16000, "not finite"),
    (np.array([0.1, np.inf, 0.1]), 16000, "not finite"),
]


@pytest.mark.parametrize(("sound", "rate", "what"), FAULTS, ids=[str(i) for i in range(len(FAULTS))])
def test_what_cannot_be_used_is_named(tmp_path: Path, sound: np.ndarray, rate: int, what: str):
    path = tmp_path / "bad.wav"
    soundfile.write(path, sound, rate, subtype="FLOAT")
    with pytest.raises(AudioError, match=rf"bad\.wav: .*{what}"):
        load_audio(path, 24000, max_seconds=1.0, lowest_rate=16000)
    with pytest.raises(AudioError, match=f"^row 3: .*{what}"):
        decode_audio(path.read_bytes(), "row 3", 24000, max_seconds=1.0, lowest_rate=16000)


def test_hours_of_silence_in_a_small_file_are_refused(tmp_path: Path):
    path = tmp_path / "hours.flac"
    with soundfile.SoundFile(path, "w", 1000, 1, format="FLAC") as file:
        for _ in range(1201):
            file.write(np.zeros(1000))
    for read in (lambda: load_audio(path, 16000, silent=True), lambda: read_recording(path)):
        with pytest.raises(AudioError, match=r"lasts 1201\.0 s, expected at most 1200 s: cut it"):
            read()


def test_limits_are_taken_themselves():
    assert len(decode_audio(encoded(tone(1, 16000), 16000), "a", 16000, max_seconds=1.0, lowest_rate=16000)) == 16000


def test_silence_may_be_asked_for():
    assert decode_audio(encoded(np.zeros(10), 16000), "a", 16000, silent=True).tolist() == [0] * 10


@pytest.mark.parametrize("data", [b"", b"no sound", encoded(tone(0.1, 16000), 16000)[:20], bytes(1000)])
def test_what_is_no_sound_is_named(tmp_path: Path, data: bytes):
    (tmp_path / "bad.wav").write_bytes(data)
    with pytest.raises(AudioError, match=r"bad\.wav: (cannot be read as sound|is empty)"):
        load_audio(tmp_path / "bad.wav", 16000)
    with pytest.raises(AudioError, match=r"row 3: (cannot be read as sound|is empty)"):
        decode_audio(data, "row 3", 16000)


def test_what_is_not_there_is_named(tmp_path: Path):
    for path in (tmp_path / "none.wav", tmp_path):
        with pytest.raises(ValueError, match=f"{path}: there is no such recording") as caught:
            load_audio(path, 16000)
        assert (caught.value.name, caught.value.what) == (str(path), "there is no such recording")


def test_written_sound_comes_back(tmp_path: Path):
    sound = tone(0.1, 24000)
    back = load_audio(write_wav(tmp_path / "a" / "b.wav", sound, 24000), 24000)
    np.testing.assert_allclose(back.numpy(), sound, atol=1 / 32767)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.wav"]


def test_rates_without_a_common_factor_are_resampled_too(tmp_path: Path):
    """Against the formula of a tone that swells and fades."""

    def tone_at(rate: float, count: int) -> np.ndarray:
        time = np.arange(count) / rate
        return 0.3 * np.sin(np.pi * time / 0.5) ** 2 * np.sin(2 * np.pi * 440 * time)

    soundfile.write(tmp_path / "odd.wav", tone_at(48001, 24000), 48001, subtype="FLOAT")
    sound = load_audio(tmp_path / "odd.wav", 24000).numpy()
    assert len(sound) == 12000
    assert np.abs(sound - tone_at(48001 / 2, 12000)).max() < 1e-5  # stretched by half a sample in 12000


def test_what_a_test_has_kept_serves_a_training():
    """A window or a filter that was first made while a trainer tested, in inference mode, takes gradients later."""
    with torch.inference_mode():
        _cached_resampler(7_000, 5_000)
        _window(37, torch.device("cpu"))
    wave = torch.randn(700, requires_grad=True)
    (
        _cached_resampler(7_000, 5_000)(wave).sum() + (wave[:37] * _window(37, torch.device("cpu"))).pow(2).sum()
    ).backward()
    assert wave.grad is not None
    assert wave.grad.abs().sum() > 0

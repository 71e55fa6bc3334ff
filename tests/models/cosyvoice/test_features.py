# SPDX-License-Identifier: Apache-2.0
"""Acoustic features against the published code's, libraries' and slowly typed formulas."""

import math

import numpy as np
import pytest
import torch
import torchaudio
from parity import as_exact_as, parity

from tts_align.models.cosyvoice.features import acoustic_mel, kaldi_fbank, mel_filters, whisper_mel

CPU = torch.device("cpu")


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.mark.parametrize(("name", "fmax"), [("mel.v2_fmax8000", 8000.0), ("mel.v3_fmaxNone", None)])
def test_the_acoustic_mel_is_the_published_one(name, fmax):
    io = parity("misc").io
    exact = acoustic_mel(io["wav24k"].double(), fmax)
    assert exact.dtype == torch.float64
    as_exact_as(acoustic_mel(io["wav24k"], fmax), io[name].transpose(1, 2), exact, bound=1e-6)


def test_the_tokenizer_s_mel_is_the_published_one():
    io = parity("misc").io
    wav = io["wav16k"][0]
    # Decades of quiet channels amplify what single precision loses.
    as_exact_as(whisper_mel(wav), io["whisper_logmel128"][0], whisper_slowly(wav), bound=2e-5)


def whisper_slowly(wav):
    """In double precision, from numpy's transform."""
    padded = np.pad(wav.numpy().astype(np.float64), 200, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    frames = [padded[start : start + 400] * window for start in range(0, len(wav) - 159, 160)]
    filters = mel_filters(16000, 400, 128, 0.0, None, CPU).double().numpy()
    decades = np.log10(np.maximum((np.abs(np.fft.rfft(frames)) ** 2 @ filters).T, 1e-10))
    return torch.from_numpy((np.maximum(decades, decades.max() - 8) + 4) / 4)


def test_the_speaker_encoder_s_features_are_the_published_ones():
    io = parity("misc").io
    wav = io["wav16k"]
    exact = torchaudio.compliance.kaldi.fbank(wav.double(), num_mel_bins=80, sample_frequency=16000, dither=0.0)
    exact = exact - exact.mean(0)
    # The lowest channels hold next to nothing, so that their logarithm amplifies what single precision loses.
    as_exact_as(kaldi_fbank(wav[0]), io["campplus_fbank80_meansub"], exact, bound=1e-4)


@pytest.mark.parametrize("features", [whisper_mel, kaldi_fbank])
def test_what_becomes_speech_tokens_does_not_depend_on_the_processor(features):
    """Single precision in, the numbers of double precision out, rounded once."""
    wav = noise(8000, seed=4)
    assert torch.equal(features(wav), features(wav.double()).float())


@pytest.mark.parametrize(
    ("sample_rate", "fft_samples", "channels", "fmin", "fmax"),
    [(24000, 1920, 80, 0.0, 8000.0), (16000, 400, 128, 0.0, None), (8000, 256, 17, 60.0, 3000.0)],
)
def test_filters_are_torchaudio_s(sample_rate, fft_samples, channels, fmin, fmax):
    top = sample_rate / 2 if fmax is None else fmax
    expected = torchaudio.functional.melscale_fbanks(
        fft_samples // 2 + 1, fmin, top, channels, sample_rate, norm="slaney", mel_scale="slaney"
    )
    found = mel_filters(sample_rate, fft_samples, channels, fmin, fmax, CPU)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert mel_filters(sample_rate, fft_samples, channels, fmin, fmax, CPU) is found, "built once"


@pytest.mark.parametrize(
    "sizes",
    [
        {"sample_rate": 24000, "fft_samples": 1920, "hop_samples": 480, "mel_channels": 80},
        {"sample_rate": 8000, "fft_samples": 64, "hop_samples": 16, "mel_channels": 5, "fmin": 100.0},
    ],
)
def test_one_frame_of_the_acoustic_mel_slowly(sizes):
    frame, fft_samples, hop = 3, sizes["fft_samples"], sizes["hop_samples"]
    wav = noise(10 * hop + 7, seed=1)
    mel = acoustic_mel(wav[None], **sizes)[0]
    assert mel.shape == (10, sizes["mel_channels"])
    padded = np.pad(wav.numpy().astype(np.float64), (fft_samples - hop) // 2, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(fft_samples) / fft_samples)
    spectrum = np.fft.rfft(padded[frame * hop : frame * hop + fft_samples] * window)
    magnitude = np.sqrt(spectrum.real**2 + spectrum.imag**2 + 1e-9)
    filters = mel_filters(
        sizes["sample_rate"], fft_samples, sizes["mel_channels"], sizes.get("fmin", 0.0), None, CPU
    ).numpy()
    np.testing.assert_allclose(mel[frame], np.log(np.maximum(magnitude @ filters, 1e-5)), atol=1e-5)


@pytest.mark.parametrize("samples", [1600, 1759, 4001])
def test_frames_are_whole_hops(samples):
    wav = noise(samples)
    assert acoustic_mel(wav[None]).shape == (1, samples // 480, 80)
    assert whisper_mel(wav).shape == (128, samples // 160)
    assert whisper_mel(wav, hop_samples=100, mel_channels=20).shape == (20, samples // 100)
    assert kaldi_fbank(wav).shape == (1 + (samples - 400) // 160, 80)
    assert kaldi_fbank(wav, mel_channels=23, hop_milliseconds=5.0).shape == (1 + (samples - 400) // 80, 23)


def test_a_batch_is_its_rows():
    rows = torch.stack([noise(2400, seed) for seed in range(3)])
    torch.testing.assert_close(acoustic_mel(rows, 8000.0)[1:2], acoustic_mel(rows[1:2], 8000.0))


def test_loudness_shifts_features_as_it_should():
    """Twice as loud: ln 2 more in the acoustic mel; the other two differ by a constant, which the mean takes away."""
    wav = noise(8000)
    shift = (acoustic_mel(2 * wav[None]) - acoustic_mel(wav[None])).median()
    assert math.isclose(shift, math.log(2), abs_tol=1e-3)
    torch.testing.assert_close(whisper_mel(2 * wav), whisper_mel(wav) + math.log10(4) / 4, atol=1e-4, rtol=0)
    torch.testing.assert_close(kaldi_fbank(2 * wav), kaldi_fbank(wav), atol=1e-3, rtol=0)
    torch.testing.assert_close(kaldi_fbank(wav).mean(0), torch.zeros(80), atol=1e-5, rtol=0)


def test_gradients_reach_silence():
    wav = torch.zeros(1, 2400, requires_grad=True)
    acoustic_mel(wav).sum().backward()
    assert torch.isfinite(wav.grad).all()


@pytest.mark.parametrize(
    ("features", "least"),
    [(lambda wav: acoustic_mel(wav[None]), 721), (whisper_mel, 201), (kaldi_fbank, 400)],
)
def test_too_short_a_sound_is_refused(features, least):
    assert features(noise(least)).numel() > 0
    with pytest.raises(ValueError, match=f"expected at least {least} samples"):
        features(noise(least - 1))


def test_edges_of_the_filters_must_be_in_order():
    with pytest.raises(ValueError, match=r"fmin < fmax <= 4000\.0 .*got 0\.0 and 5000\.0"):
        acoustic_mel(noise(1000)[None], fmax=5000.0, sample_rate=8000)

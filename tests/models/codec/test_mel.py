# SPDX-License-Identifier: Apache-2.0
import dataclasses

import numpy as np
import pytest
import torch

from tts_align.models.codec.log_mel import LogMel, log_mel_batch
from tts_align.models.codec.mel import CodecSizes, MelCodec, MelTokenizer
from tts_align.models.codec.vocoder import MelVocoder

SIZES = CodecSizes(
    speakers=("anna", "ben"),
    mel_channels=20,
    frames_per_token=4,
    levels=(5, 4),
    embedding_channels=8,
    encoder_channels=16,
    encoder_blocks=1,
    decoder_channels=16,
    decoder_blocks=2,
)


@pytest.fixture
def directory(tmp_path):
    torch.manual_seed(0)
    MelCodec(SIZES).save(tmp_path / "codec")
    return str(tmp_path / "codec")


def test_log_mel_is_the_formula():
    """Hann window, magnitude spectrum, triangles on the HTK mel scale, natural log, scaled; typed again with NumPy."""
    sizes = {"sample_rate": 16000, "window_samples": 512, "hop_samples": 160, "mel_channels": 20}
    audio = torch.randn(1, 4000, generator=torch.Generator().manual_seed(1)) * 0.1
    frame = 5
    samples = np.pad(audio[0].numpy().astype(np.float64), 256, mode="reflect")[frame * 160 : frame * 160 + 512]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)
    magnitude = np.abs(np.fft.rfft(samples * window))
    mels = np.linspace(2595 * np.log10(1 + 40 / 700), 2595 * np.log10(1 + 8000 / 700), 22)
    corners, bins = 700 * (10 ** (mels / 2595) - 1), np.arange(257) * 16000 / 512
    rising = (bins - corners[:-2, None]) / np.diff(corners)[:-1, None]
    falling = (corners[2:, None] - bins) / np.diff(corners)[1:, None]
    expected = np.log(np.maximum(np.maximum(0, np.minimum(rising, falling)) @ magnitude, 1e-3))
    np.testing.assert_allclose(LogMel(**sizes)(audio)[0, frame], (expected + 2.5) / 3.0, atol=1e-4)


def test_magnitude_undoes_the_mel():
    features = LogMel(mel_channels=20)
    log_mel = features(torch.randn(1, 3200, generator=torch.Generator().manual_seed(1)))
    mel = features.magnitude(log_mel) @ features.mel.mel_scale.fb
    again = (mel.clamp_min(1e-3).log() + 2.5) / 3.0
    assert (again - log_mel).abs().mean() < 0.05, "clipping at zero is all that may differ"


def test_features_do_not_depend_on_the_batch():
    features, generator = LogMel(mel_channels=20), torch.Generator().manual_seed(2)
    long, short = torch.randn(4000, generator=generator), torch.randn(1500, generator=generator)
    batch, frames = log_mel_batch(features, [long, short])
    alone, count = log_mel_batch(features, [short])
    assert frames.tolist() == [25, 9]
    torch.testing.assert_close(batch[1, : int(count)], alone[0], atol=1e-5, rtol=1e-4)


def test_codes_and_waveforms_do_not_depend_on_the_batch(directory):
    tokenizer, vocoder = MelTokenizer(directory, batch_size=2), MelVocoder(directory, iterations=4, batch_size=2)
    generator = torch.Generator().manual_seed(3)
    sounds = [torch.randn(length, generator=generator) * 0.1 for length in (5000, 1200, 3000)]
    speech_tokens = tokenizer.encode(sounds)
    assert [len(row) for row in speech_tokens] == [8, 2, 5]
    assert [tokenizer.encode([sound])[0].tolist() for sound in sounds] == [row.tolist() for row in speech_tokens]
    names = ["ben", "anna", "ben"]
    spoken = vocoder.speak(speech_tokens, names)
    for row, name, waveform in zip(speech_tokens, names, spoken, strict=True):
        assert len(waveform) == len(row) * 4 * 160
        torch.testing.assert_close(vocoder.speak([row], [name])[0], waveform, atol=1e-4, rtol=1e-3)


def test_speaker_changes_the_sound_and_an_unknown_one_is_named(directory):
    vocoder = MelVocoder(directory, iterations=2)
    speech_tokens = torch.arange(6)
    anna, ben = vocoder.speak([speech_tokens, speech_tokens], ["anna", "ben"])
    assert not torch.allclose(anna, ben)
    with pytest.raises(ValueError, match=r"\['carl'\].*anna"):
        vocoder.speak([speech_tokens], ["carl"])


def test_nothing_to_say(directory):
    vocoder = MelVocoder(directory, iterations=2)
    empty, some = vocoder.speak([torch.zeros(0, dtype=torch.long), torch.tensor([3])], ["anna", "ben"])
    assert len(empty) == 0
    assert len(some) == 640
    assert vocoder.speak([], []) == []
    assert [len(row) for row in MelTokenizer(directory).encode([torch.zeros(0), torch.zeros(100)])] == [0, 0]


def test_a_loaded_codec_is_the_saved_one_to_half_precision(directory):
    torch.manual_seed(0)
    made, loaded = MelCodec(SIZES).eval(), MelCodec.load(directory)
    assert loaded.sizes == SIZES
    assert dataclasses.asdict(loaded.sizes)["speakers"] == ("anna", "ben")
    log_mel, frames = torch.randn(2, 8, 20), torch.tensor([8, 5])
    embedding = made.tokenizer(log_mel, frames).embedding
    mask, speaker = torch.ones(2, 2, dtype=torch.bool), torch.tensor([0, 1])
    torch.testing.assert_close(
        loaded.decoder(embedding, mask, speaker), made.decoder(embedding, mask, speaker), atol=1e-2, rtol=1e-2
    )


def test_the_codec_learns():
    """Thirty steps bring the error down, and gradients reach the encoder through the rounding."""
    torch.manual_seed(0)
    codec = MelCodec(SIZES)
    log_mel, frames, speaker = torch.randn(4, 16, 20), torch.full((4,), 16), torch.tensor([0, 1, 0, 1])
    optimizer = torch.optim.AdamW(codec.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = (codec(log_mel, frames, speaker) - log_mel).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert codec.tokenizer.stem.weight.grad.abs().sum() > 0

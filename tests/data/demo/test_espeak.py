# SPDX-License-Identifier: Apache-2.0
import random

import numpy as np
import pytest
import torch

from tts_align.data.demo.audio import ALPHABET, SAMPLE_RATE, PhraseBank, free_speech, speed_jitter
from tts_align.data.demo.espeak import EspeakPhrase, synthesise
from tts_align.data.demo.sentences import READINGS, SPEAKERS, all_sentences

pytest.importorskip("espeakng_loader", reason="the extra `demo` is not installed")


def test_the_same_batch_gives_the_same_samples():
    batch = [
        EspeakPhrase("からい", "ja+f2", 350),
        EspeakPhrase("つらい", "ja+m3", 300),
        EspeakPhrase("からい", "ja+f2", 350),
    ]
    first, second = synthesise(batch), synthesise(batch)
    assert len(first) == 3
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    assert 0.2 < len(first[0]) / 22050 < 1.0
    assert np.abs(first[0]).max() > 3000


def test_a_failure_of_the_worker_is_shown():
    with pytest.raises(RuntimeError, match="no voice 'nobody'"):
        synthesise([EspeakPhrase("からい", "nobody", 350)])


def test_sentences_fall_on_the_token_grid():
    bank, generator = PhraseBank(token_samples=1280), random.Random(0)
    clips = {
        (sentence.id, reading, speaker): bank.say(sentence, reading, speaker, generator)
        for sentence in all_sentences()[::120]
        for reading in READINGS
        for speaker in SPEAKERS
    }
    for clip in clips.values():
        assert len(clip.audio) % 1280 == 0
        assert 0.5 < len(clip.audio) / SAMPLE_RATE < 2.5
        assert clip.audio.abs().max() <= 1.0


def test_free_speech_is_written_in_the_alphabet():
    clips = free_speech(20, "test", SPEAKERS)
    assert set("".join(clip.kana for clip in clips)) <= set(ALPHABET)
    assert len({clip.kana for clip in clips}) == 20
    jittered = speed_jitter(clips, "test")
    assert all(abs(len(new.audio) / len(old.audio) - 1) < 0.05 for new, old in zip(jittered, clips, strict=True))
    assert all(torch.isfinite(clip.audio).all() for clip in jittered)

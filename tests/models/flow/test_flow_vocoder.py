# SPDX-License-Identifier: Apache-2.0
"""Speech tokens heard through the flow that is being trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_sound import FLOW, FSQ, VOICES, parts

from tts_align.models.codec.mel_fsq import MelFSQ
from tts_align.models.flow.dit import DiTFlow
from tts_align.models.flow.vocoder import FlowVocoder


def made(dtype: torch.dtype = torch.float32) -> FlowVocoder:
    models = parts(seed=2)
    vocoder = FlowVocoder(steps=3, iterations=2, batch_size=2)
    vocoder.attach(models["flow"].to(dtype).train(), models["tokenizer"].to(dtype), VOICES)
    return vocoder.to(dtype)


@pytest.fixture(scope="module")
def vocoder() -> FlowVocoder:
    return made()


def test_an_utterance_depends_on_itself_alone():
    """In double precision: Griffin-Lim finds phases where next to nothing sounds, and amplifies the last bits there."""
    vocoder = made(torch.float64)
    speech = [
        torch.tensor(speech_tokens, dtype=torch.long) for speech_tokens in ([1, 2, 3], [4], [], [5, 6, 7, 8], [1, 2, 3])
    ]
    speakers = ["ann", "bob", "ann", "bob", "bob"]
    together = vocoder.speak(speech, speakers)
    assert [len(wave) for wave in together] == [len(speech_tokens) * 64 for speech_tokens in speech]
    for speech_tokens, name, wave in zip(speech, speakers, together, strict=True):
        (alone,) = vocoder.speak([speech_tokens], [name])
        torch.testing.assert_close(alone, wave, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(together[0], together[4])
    assert vocoder.models[0].training  # as it was


def test_in_single_precision_the_mel_of_an_utterance_is_its_own(vocoder: FlowVocoder):
    together, frames = vocoder.log_mel([torch.tensor([1, 2, 3]), torch.tensor([5, 6, 7, 8])], ["ann", "bob"])
    alone, _ = vocoder.log_mel([torch.tensor([1, 2, 3])], ["ann"])
    assert frames.tolist() == [6, 8]
    torch.testing.assert_close(together[:1, :6], alone, atol=1e-5, rtol=1e-5)


def test_it_hears_the_flow_as_it_is_now_and_owns_nothing(vocoder: FlowVocoder):
    assert not list(vocoder.parameters())
    before = vocoder.digest()
    (wave,) = vocoder.speak([torch.tensor([1, 2])], ["ann"])
    with torch.no_grad():
        vocoder.models[0].table.weight.mul_(1.5)
    assert vocoder.digest() != before
    (other,) = vocoder.speak([torch.tensor([1, 2])], ["ann"])
    assert not torch.allclose(wave, other)


def test_what_it_cannot_speak_with():
    vocoder = FlowVocoder()
    with pytest.raises(ValueError, match="use it with an objective"):
        vocoder.speak([torch.tensor([1])], ["ann"])
    with pytest.raises(ValueError, match="as many mel channels"):
        vocoder.attach(DiTFlow(replace(FLOW, mel_channels=8)), MelFSQ(sizes=FSQ), VOICES)
    made = parts()
    vocoder.attach(made["flow"], made["tokenizer"], VOICES)
    with pytest.raises(ValueError, match=r"unknown speakers \['zoe'\]"):
        vocoder.speak([torch.tensor([1])], ["zoe"])
    with pytest.raises(ValueError, match="at least 1"):
        FlowVocoder(steps=0)

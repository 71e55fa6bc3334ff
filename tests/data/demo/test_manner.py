# SPDX-License-Identifier: Apache-2.0
import math
import random
from collections import Counter

import pytest
import torch
from pitched import pitched_bank

from tts_align.cli.demo.gates import Gate
from tts_align.cli.demo.manner_gates import (
    StyleRule,
    beyond_copies,
    measure_styles,
    median_pitch,
    noise_level,
    style_rule,
)
from tts_align.data.demo import manner
from tts_align.data.demo.audio import Clip
from tts_align.data.demo.manner import MANNERS, QUALITIES, Style, draw_style
from tts_align.data.demo.sentences import READINGS, SPEAKERS, split_sentences

SENTENCES = split_sentences()["dev"]


@pytest.fixture(scope="module")
def bank():
    with pytest.MonkeyPatch.context() as patch:
        yield pitched_bank(patch)


def clips(bank, count, seed=0):
    generator = random.Random(seed)
    styles = [Style(generator.choice(list(MANNERS)), generator.choice(list(QUALITIES))) for _ in range(count)]
    said = [
        bank.say(generator.choice(SENTENCES), READINGS[0], SPEAKERS[place % 2], style, generator)
        for place, style in enumerate(styles)
    ]
    return said, styles


def test_styles_are_drawn_by_their_shares_and_independently():
    generator = random.Random(1)
    drawn = Counter(draw_style(generator) for _ in range(8000))
    for style, count in drawn.items():
        expected = MANNERS[style.manner].share * QUALITIES[style.quality].share
        assert count / 8000 == pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected) / 8000))
    assert len(drawn) == 6
    assert MANNERS["plain"].share + MANNERS["lively"].share == 1


def test_an_utterance_has_one_manner_whole_tokens_and_its_noise(bank):
    sentence = SENTENCES[0]
    for speaker in SPEAKERS:
        plain, lively = (
            bank.say(sentence, READINGS[0], speaker, Style(name, 5), random.Random(2)) for name in ("plain", "lively")
        )
        assert len(plain.audio) % 1280 == len(lively.audio) % 1280 == 0
        assert median_pitch(lively.audio) > 1.15 * median_pitch(plain.audio)
        for score in (3, 1):
            noisy = bank.say(sentence, READINGS[0], speaker, Style("plain", score), random.Random(2))
            assert float((noisy.audio - plain.audio).std()) == pytest.approx(QUALITIES[score].noise, rel=0.05)
    assert plain.kana == sentence.transcript(READINGS[0])
    again = bank.say(sentence, READINGS[0], "takumi", Style("plain", 1), random.Random(2))
    assert torch.equal(again.audio, noisy.audio)


def test_manners_are_apart_in_pitch_range_and_rate(monkeypatch):
    """What eSpeak is asked for: a phrase is never spoken with the settings of the other manner."""
    asked = []
    monkeypatch.setattr(manner, "synthesise", lambda all_of: asked.extend(all_of) or [torch.zeros(9)] * len(all_of))
    manner.MannerBank(4)
    by_pitch = {pitch: [one for one in asked if one.pitch == pitch] for pitch in {one.pitch for one in asked}}
    plain, lively = by_pitch[MANNERS["plain"].pitch], by_pitch[MANNERS["lively"].pitch]
    assert len(plain) == len(lively) == len(asked) / 2
    assert {one.text for one in plain} == {one.text for one in lively}
    assert max(one.pitch_range for one in plain) < min(one.pitch_range for one in lively)
    assert min(one.rate for one in plain) > max(one.rate for one in lively)


def test_real_voices_differ_in_pitch():
    pytest.importorskip("espeakng_loader", reason="eSpeak comes with the extra demo")
    from tts_align.data.demo.audio import VOICES, synthesise
    from tts_align.data.demo.espeak import EspeakPhrase

    said = [
        EspeakPhrase("かれーわ", voice, one.rates[0], one.pitch, one.pitch_range)
        for voice in VOICES.values()
        for one in MANNERS.values()
    ]
    heard = [median_pitch(clip) for clip in synthesise(said)]
    assert heard[1] > 1.15 * heard[0]
    assert heard[3] > 1.15 * heard[2]


def test_the_rule_tells_styles_it_was_not_made_from(bank):
    rule = style_rule(*clips(bank, 36))
    heard, styles = clips(bank, 12, seed=7)
    gates = measure_styles(rule, heard, styles)
    assert [gate.value for gate in gates] == [1.0, 1.0]
    turned = [Style("plain" if style.manner == "lively" else "lively", 5) for style in styles]
    assert measure_styles(rule, heard, turned)[0].value == 0
    assert not measure_styles(rule, heard, turned)[0].passed


def test_sound_without_a_pitch_has_no_manner():
    rule = StyleRule(dict.fromkeys(SPEAKERS, 150.0), (-45.0, -55.0))
    hiss = 0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(0))
    assert rule.manner(torch.zeros(8000), "sakura") == ""
    assert rule.quality(hiss) == 1
    assert rule.quality(torch.zeros(8000)) == 5
    assert rule.quality(hiss / 1000) == 5
    assert rule.quality(hiss / 100) == 3
    assert rule.quality(torch.zeros(0)) == 0
    assert math.isnan(noise_level(torch.zeros(0)))
    assert math.isnan(median_pitch(Clip(torch.zeros(10), "", "").audio))


def test_slips_of_the_base_count_beyond_those_of_copies():
    gates = [Gate("base CER", 0.1, high=0.2), Gate("base nearest CER", 0.031, high=0.03)]
    assert not gates[1].passed
    first, second = beyond_copies(gates, 0.022)
    assert first == gates[0]
    assert second.value == pytest.approx(0.009)
    assert second.passed
    assert not beyond_copies(gates, 0.0005)[1].passed

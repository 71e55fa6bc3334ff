# SPDX-License-Identifier: Apache-2.0
"""Duration, silence, clipping, stops, repetition and pitch, on sounds whose answer is known by construction."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_align.evaluation.measures.base import MeasuredSample
from tts_align.evaluation.measures.pitch import PitchSpread, fundamental_frequency, spread_in_semitones
from tts_align.evaluation.measures.repetition import Repetition, looped_share
from tts_align.evaluation.measures.rhythm import (
    Clipping,
    DurationRatio,
    EndOfSpeech,
    LongestSilence,
    expected_seconds,
)

RATE = 16_000


def sample(wave=None, rate=RATE, text="hello", speech=(), finished=True, transcript="", language=""):
    return MeasuredSample(
        wave, rate, text, torch.tensor(speech, dtype=torch.long), finished, None, transcript, language
    )


def tone(frequency, seconds=1.0, rate=RATE, harmonics=(1,)):
    phase = 2 * math.pi * frequency * torch.arange(round(seconds * rate), dtype=torch.float64) / rate
    return sum(torch.sin(number * phase) / len(harmonics) for number in harmonics).float()


def silence(seconds, rate=RATE):
    return torch.zeros(round(seconds * rate))


@pytest.mark.parametrize(
    ("text", "language", "seconds"),
    [
        ("", "", 0.0),
        ("Hello, you!", "en", 8 * 0.07),
        ("カレーは辛い", "", 5 * 0.13 + 0.26),  # a long mark is a mora
        ("ちょっと", "", 3 * 0.13),  # a small kana belongs to the mora before it, a small tsu is one
        ("银行", "", 2 * 0.22),
        ("銀行", "ja", 2 * 0.26),
        ("３人", "zh", 0.35 + 0.22),
        ("안녕", "ko", 2 * 0.22),
    ],
)
def test_expected_length_goes_by_script(text, language, seconds):
    assert expected_seconds(text, language) == pytest.approx(seconds)


def test_duration_ratio():
    slow, empty = sample(silence(0.7, 24_000), 24_000, "hello"), sample(silence(1), text="…")
    assert DurationRatio().measure([slow, empty]) == [{"duration_ratio": pytest.approx(2)}, {}]


@pytest.mark.parametrize("rate", [16_000, 24_000])
def test_the_longest_silence_is_found_inside_and_at_the_end(rate):
    def found(*parts):
        return LongestSilence().measure([sample(torch.cat(parts), rate)])[0]["longest_silence"]

    voice = tone(200, 0.5, rate)
    assert found(voice, silence(0.4, rate), voice) == pytest.approx(0.4, abs=0.041)
    assert found(voice, silence(0.2, rate), voice, silence(1.3, rate)) == pytest.approx(1.3, abs=0.041)
    assert found(voice, 0.005 * tone(200, 0.6, rate), voice) == pytest.approx(0.6, abs=0.041)  # 46 dB below
    assert found(voice, 0.05 * tone(200, 0.6, rate), voice) == 0  # 26 dB below: quiet speech
    assert found(silence(2.0, rate)) == 2.0


def test_clipping_is_the_share_at_full_scale():
    wave = torch.cat([torch.ones(10), -torch.ones(5), 0.9 * torch.ones(85)])
    assert Clipping().measure([sample(wave), sample(silence(0))]) == [{"clipping": pytest.approx(0.15)}, {}]


def test_end_of_speech_counts_where_it_is_known():
    stops = [sample(finished=True), sample(finished=False), sample(finished=None)]
    assert EndOfSpeech().measure(stops) == [{"end_of_speech": 1}, {"end_of_speech": 0}, {}]


def test_loops_of_speech_tokens_and_of_words():
    loop = [1, 2, *[7, 8, 9] * 6, 3, 4]
    found = Repetition().measure(
        [
            sample(speech=loop),
            sample(speech=[5] * 50),  # silence is one speech token after another
            sample(transcript="you you you you", text="you"),
            sample(transcript="ははははは", text="ははははは"),
            sample(transcript="once only"),
            sample(),
        ]
    )
    assert found[0] == {"repetition_tokens": pytest.approx(18 / 22)}
    assert found[1] == {"repetition_tokens": 0}
    assert found[2] == {"repetition_transcript": 1}
    assert found[3] == found[4] == {"repetition_transcript": 0}
    assert found[5] == {}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=14), st.integers(1, 4))
def test_loops_are_what_a_slow_search_finds(items, longest):
    """Mark every stretch that is one pattern three times or more."""
    marked = [False] * len(items)
    for period in range(1, longest + 1):
        for start in range(len(items)):
            for end in range(start + 3 * period, len(items) + 1):
                if all(items[place] == items[place - period] for place in range(start + period, end)):
                    marked[start:end] = [True] * (end - start)
    assert looped_share(items, longest) == pytest.approx(sum(marked) / max(len(items), 1))


@pytest.mark.parametrize("frequency", [80.0, 123.4, 220.0, 430.0])
@pytest.mark.parametrize("harmonics", [(1,), (1, 2, 3, 4), (2, 3, 4)])
def test_pitch_of_tones_with_and_without_their_fundamental(frequency, harmonics):
    found = fundamental_frequency(tone(frequency, 0.4, harmonics=harmonics))
    assert found.isfinite().all()
    assert torch.allclose(found, torch.full_like(found, frequency), rtol=5e-3)


def test_noise_silence_and_what_is_too_short_have_no_pitch():
    noise = torch.randn(RATE, generator=torch.Generator().manual_seed(0)) * 0.1
    assert fundamental_frequency(noise).isfinite().float().mean() < 0.05
    assert not fundamental_frequency(silence(0.5)).isfinite().any()
    assert len(fundamental_frequency(silence(0.01))) == 0
    half = fundamental_frequency(torch.cat([tone(150, 0.5), silence(0.5)]))
    assert half[:40].isfinite().all()
    assert not half[60:].isfinite().any()


@pytest.mark.parametrize("rate", [16_000, 24_000])
def test_spread_of_a_vibrato_is_its_depth_over_the_root_of_two(rate):
    """Frequency 180 * 2 ** (3 sin(2 pi t) / 12): three semitones up and down once a second."""
    time = torch.arange(2 * rate, dtype=torch.float64) / rate
    frequency = 180 * 2 ** (3 * torch.sin(2 * math.pi * time) / 12)
    wave = torch.sin(2 * math.pi * torch.cumsum(frequency, 0) / rate).float()
    flat, moved = PitchSpread().measure([sample(tone(180, 2.0, rate), rate), sample(wave, rate)])
    assert flat["pitch_spread"] < 0.05
    assert moved["pitch_spread"] == pytest.approx(3 / math.sqrt(2), rel=0.03)


def test_spread_needs_voice_and_forgets_octave_jumps():
    assert PitchSpread().measure([sample(silence(1)), sample(tone(150, 0.1))]) == [{}, {}]
    assert spread_in_semitones(torch.tensor([100.0] * 9 + [410.0, math.nan])) == pytest.approx(0, abs=1e-9)
    assert math.isnan(spread_in_semitones(torch.tensor([math.nan])))


@pytest.mark.parametrize(
    ("kind", "knobs"),
    [
        (LongestSilence, {"below": 0.0}),
        (Clipping, {"level": 2.0}),
        (Repetition, {"times": 1}),
        (PitchSpread, {"voiced_frames": 0}),
    ],
)
def test_knobs_that_make_no_sense(kind, knobs):
    with pytest.raises(ValueError, match=f"{kind.__name__}: "):
        kind(**knobs)

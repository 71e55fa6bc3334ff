# SPDX-License-Identifier: Apache-2.0
"""Rows with recordings only get their speech tokens from the tokenizer, or a fault that names the remedy."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from torch import Tensor

from tts_align.data.encode import encode_audio
from tts_align.data.manifest import read_manifest, write_manifest
from tts_align.data.records import Manifest, ManifestError, Pair, Row, Sound
from tts_align.models.base.tokenizer import SpeechTokenizer


class Loudness(SpeechTokenizer):
    """One code for each hundred samples: the rounded mean."""

    speech_tokens, sample_rate = 10, 1000

    def encode(self, waveforms: list[Tensor]) -> list[Tensor]:
        return [sound[: len(sound) // 100 * 100].view(-1, 100).mean(1).mul(10).round().long() for sound in waveforms]


@pytest.fixture
def recorded(tmp_path: Path) -> Manifest:
    levels = {"a": [0.1, 0.2], "b": [0.3], "fast": [0.5, 0.5, 0.5]}
    for name, level in levels.items():
        rate = 2000 if name == "fast" else 1000
        soundfile.write(tmp_path / f"{name}.wav", np.repeat(level, 100 * rate // 1000), rate, subtype="FLOAT")
    rows = [
        Row("one", "one", audio="a.wav", desirable=True),
        Row("two", "two", speech=(7,), audio="b.wav"),
        Row("three", "three", pair=Pair(Sound((9,)), Sound(audio="b.wav"))),
        Row("four", "four", audio="fast.wav"),
    ]
    return read_manifest(write_manifest(rows, tmp_path / "rows.jsonl"))


def test_codes_are_filled_in_where_they_lack(recorded: Manifest):
    one, two, three, four = encode_audio(recorded, Loudness(), batch_size=2)
    assert (one.speech, one.audio, one.desirable) == ((1, 2), "a.wav", True)
    assert two.speech == (7,)
    assert three.pair == Pair(Sound((9,)), Sound((3,), "b.wav"))
    assert len(four.speech) == 3  # resampled from twice the rate
    assert four.speech[1] == 5


def test_without_a_tokenizer_every_such_row_is_named(recorded: Manifest):
    with pytest.raises(
        ManifestError, match=r"(?s)3 faults.*row 'one': has audio only: name a speech tokenizer.*'four'"
    ):
        encode_audio(recorded, None)


def test_a_recording_without_codes_is_named(recorded: Manifest, tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", np.zeros(10), 1000)
    with pytest.raises(ManifestError, match=r"a\.wav: too short to give a speech token"):
        encode_audio(recorded, Loudness())


def test_codes_alone_need_no_tokenizer():
    manifest = Manifest(Path("rows.jsonl"), (Row("a", "one", speech=(1,)),))
    assert encode_audio(manifest, None) is manifest.rows


def test_recordings_that_cannot_be_used_are_all_named(recorded: Manifest, tmp_path: Path):
    (tmp_path / "a.wav").write_bytes(b"no sound")
    soundfile.write(tmp_path / "fast.wav", np.full(9, np.nan), 1000, subtype="FLOAT")
    with pytest.raises(ManifestError, match=r"(?s)2 faults.*a\.wav: cannot be read.*fast\.wav: .*not finite"):
        encode_audio(recorded, Loudness(), batch_size=1)


def test_a_recording_longer_than_the_tokenizer_takes_is_named(recorded: Manifest):
    tokenizer = Loudness()
    tokenizer.max_seconds = 0.25
    with pytest.raises(ManifestError, match=r"fast\.wav: lasts 0\.3 s, expected at most 0\.25 s"):
        encode_audio(recorded, tokenizer)


def test_silence_is_an_utterance_too(recorded: Manifest, tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", np.zeros(200), 1000)
    assert encode_audio(recorded, Loudness())[0].speech == (0, 0)

# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import soundfile

from tts_align.evaluation.audio import write_pair, write_wav


def test_samples_come_back_within_half_a_step(tmp_path):
    sound = np.linspace(-1, 1, 801)
    path = write_wav(tmp_path / "audio" / "a.wav", sound, 16000)
    back, rate = soundfile.read(path, dtype="int16")
    assert rate == 16000
    assert np.abs(back / 32767 - sound).max() <= 0.5 / 32767 + 1e-9
    assert soundfile.info(path).subtype == "PCM_16"
    assert [other.name for other in path.parent.iterdir()] == ["a.wav"]


def test_too_loud_is_clipped_not_wrapped(tmp_path):
    back, _ = soundfile.read(write_wav(tmp_path / "a.wav", [2.0, -3.0], 8000), dtype="int16")
    assert back.tolist() == [32767, -32767]


@pytest.mark.parametrize("sound", [[[0.0, 0.1]], [0.0, float("nan")]])
def test_what_is_no_mono_sound_leaves_no_file(tmp_path, sound):
    with pytest.raises(ValueError, match="finite samples of one channel"):
        write_wav(tmp_path / "a.wav", sound, 8000)
    assert not list(tmp_path.iterdir())


def test_before_and_after_get_the_same_gain(tmp_path):
    paths = write_pair(tmp_path, "s1", {"base": np.array([0.5, 1.0]), "aligned": np.array([2.0, -1.0])}, 8000)
    assert [path.name for path in paths.values()] == ["s1-base.wav", "s1-aligned.wav"]
    base, aligned = (soundfile.read(path)[0] for path in paths.values())
    assert base == pytest.approx([0.25, 0.5], abs=1e-4)
    assert aligned == pytest.approx([1.0, -0.5], abs=1e-4)

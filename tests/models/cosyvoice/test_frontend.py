# SPDX-License-Identifier: Apache-2.0
"""The ONNX models hear each utterance as if it were alone, whatever their inputs are called."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile
import torch
from onnx_models import (
    CODES,
    expected_codes,
    save_directory,
    save_speaker_encoder,
    save_speech_tokenizer,
    speaker_weights,
)
from torch import Tensor

from tts_align.data.encode import encode_audio
from tts_align.data.manifest import read_manifest
from tts_align.data.records import ManifestError
from tts_align.models.cosyvoice.features import kaldi_fbank, whisper_mel
from tts_align.models.cosyvoice.frontend import CosyVoiceTokenizer, SpeakerEncoder

FAMILIES = ["cosyvoice2", "cosyvoice3"]


def sounds(*lengths: int, seed: int = 0) -> list[Tensor]:
    """Noise whose loudness goes up and down."""
    chance = torch.Generator().manual_seed(seed)
    swell = [torch.sin(torch.arange(length) / 900).abs() for length in lengths]
    return [0.3 * some * torch.randn(len(some), generator=chance) for some in swell]


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_directory(tmp_path_factory.mktemp("models") / "model", request.param)


@pytest.mark.parametrize("length", [400, 639, 640, 641, 1280, 9737, 16000])
def test_codes_are_those_of_the_model(directory: Path, length: int):
    [sound] = sounds(length, seed=length)
    expected = expected_codes(whisper_mel(sound).numpy()).tolist()
    frames = length // 160
    [single] = CosyVoiceTokenizer(str(directory), batch_size=1).encode([sound])
    assert single.dtype == torch.long
    assert single.tolist() == expected
    assert len(single) == -(-frames // 4)
    [batch] = CosyVoiceTokenizer(str(directory)).encode([sound])
    assert batch.tolist() == expected[: frames // 4]  # a token of the batch model stands for four whole frames


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_codes_do_not_depend_on_neighbours(directory: Path, batch_size: int):
    waveforms = sounds(9000, 700, 100, 16001, 3000, 0, 12345, 640)
    tokenizer = CosyVoiceTokenizer(str(directory), batch_size)
    alone = [tokenizer.encode([waveform])[0].tolist() for waveform in waveforms]
    together = [speech_tokens.tolist() for speech_tokens in tokenizer.encode(waveforms)]
    assert together == alone
    assert [len(speech_tokens) for speech_tokens in together] == [len(waveform) // 160 // 4 for waveform in waveforms]
    assert len({tuple(speech_tokens) for speech_tokens in together}) > 4
    assert tokenizer.encode([]) == []


def test_the_file_that_is_there_is_used(tmp_path: Path):
    single = CosyVoiceTokenizer(str(save_directory(tmp_path / "a", batched=False)))
    assert (single.batched, single.batch_size, single.model.path.name) == (False, 1, "speech_tokenizer_v2.onnx")
    assert [len(speech_tokens) for speech_tokens in single.encode(sounds(700, 9000))] == [1, 14]
    both = save_directory(tmp_path / "b", "cosyvoice3")
    assert CosyVoiceTokenizer(str(both)).model.path.name == "speech_tokenizer_v3.batch.onnx"
    (both / "speech_tokenizer_v3.onnx").unlink()
    assert CosyVoiceTokenizer(str(both), batch_size=1).model.path.name == "speech_tokenizer_v3.batch.onnx"
    (both / "speech_tokenizer_v3.batch.onnx").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no speech_tokenizer_v3\.onnx: .* holds .*campplus\.onnx"):
        CosyVoiceTokenizer(str(both))


def test_thirty_seconds_are_the_limit(directory: Path):
    tokenizer = CosyVoiceTokenizer(str(directory))
    assert (tokenizer.sample_rate, tokenizer.max_seconds, tokenizer.codebook_size) == (16000, 30.0, CODES)
    longest = 30 * 16000
    assert len(tokenizer.encode(sounds(longest))[0]) == 750
    with pytest.raises(ValueError, match=r"waveform 2 of 2 lasts 30\.1 s, but .* at most 30 s: cut it"):
        tokenizer.encode(sounds(800, longest + 1600))


def test_settings_without_sense_are_refused(directory: Path):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        CosyVoiceTokenizer(str(directory), batch_size=0)


def test_codes_beyond_the_yaml_are_refused(tmp_path: Path):
    directory = save_directory(tmp_path / "a", codebook_size=50)
    save_speech_tokenizer(directory / "speech_tokenizer_v2.onnx", 200)
    with pytest.raises(ValueError, match=r"speech_tokenizer_v2\.onnx gave tokens \d+\.\.\d+, expected 0\.\.49"):
        CosyVoiceTokenizer(str(directory), batch_size=1).encode(sounds(16000))


def test_what_is_no_onnx_model_is_named(tmp_path: Path):
    directory = save_directory(tmp_path / "a")
    (directory / "campplus.onnx").write_bytes(b"half a downl")
    with pytest.raises(ValueError, match=r"cannot open .*campplus\.onnx as an ONNX model"):
        SpeakerEncoder(str(directory)).encode(sounds(8000))
    save_speaker_encoder(directory / "speech_tokenizer_v2.onnx")
    with pytest.raises(ValueError, match=r"v2\.onnx takes 1 inputs, expected 2"):
        CosyVoiceTokenizer(str(directory), 1).encode(sounds(8000))


def test_names_of_inputs_do_not_matter(tmp_path: Path):
    directory = save_directory(tmp_path / "a")
    path = directory / "speech_tokenizer_v2.onnx"
    [sound] = sounds(8000)
    [before] = CosyVoiceTokenizer(str(directory), 1).encode([sound])
    model = onnx.load(path)
    names = {value.name: f"x{i}" for i, value in enumerate(model.graph.input)}
    for value in model.graph.input:
        value.name = names[value.name]
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    onnx.save(model, path)
    assert torch.equal(CosyVoiceTokenizer(str(directory), 1).encode([sound])[0], before)


def test_tokenizers_have_no_state_and_can_be_copied_and_sent(directory: Path):
    tokenizer = CosyVoiceTokenizer(str(directory))
    waveforms = sounds(5000, 6000)
    before = tokenizer.encode(waveforms)  # the model is open now
    assert not tokenizer.state_dict()
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert [speech_tokens.tolist() for speech_tokens in other.encode(waveforms)] == [
            speech_tokens.tolist() for speech_tokens in before
        ]


@pytest.mark.parametrize("size", [192, 16])
def test_the_vector_of_a_voice(tmp_path: Path, size: int):
    directory = save_directory(tmp_path / "a")
    save_speaker_encoder(directory / "campplus.onnx", size)
    waveforms = sounds(8000, 400, 8000, 12000)
    vectors = SpeakerEncoder(str(directory)).encode(waveforms)
    assert vectors.shape == (4, size)
    for vector, waveform in zip(vectors, waveforms, strict=True):
        features = kaldi_fbank(waveform).numpy().astype(np.float64)
        expected = (features**2).mean(0) @ speaker_weights(size)
        np.testing.assert_allclose(vector.numpy(), expected, rtol=1e-3, atol=1e-3)


def test_no_voice_without_sound(directory: Path):
    encoder = SpeakerEncoder(str(directory))
    with pytest.raises(ValueError, match="at least one waveform"):
        encoder.encode([])
    with pytest.raises(ValueError, match=r"at least 400 samples .* got 399"):
        encoder.encode(sounds(399))


def test_recordings_of_a_manifest(directory: Path, tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(size=(44100, 2)) / 9, 44100)
    soundfile.write(tmp_path / "long.wav", np.zeros(31 * 8000), 8000)
    rows = [{"id": name, "text": "Hello.", "audio": f"{name}.wav"} for name in ("a", "long")]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(rows[0]))
    assert len(encode_audio(read_manifest(path), CosyVoiceTokenizer(str(directory)))[0].speech) == 25
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ManifestError, match=r"long\.wav: lasts 31\.0 s, expected at most 30 s"):
        encode_audio(read_manifest(path), CosyVoiceTokenizer(str(directory)))

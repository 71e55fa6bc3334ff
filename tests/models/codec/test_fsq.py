# SPDX-License-Identifier: Apache-2.0
"""The small tokenizer that trains: the codec's speech tokens, its count, and its directory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_sound import FSQ

from tts_align.models.codec.mel import MelTokenizer
from tts_align.models.codec.mel_fsq import FSQSizes, MelFSQ


def test_it_is_the_tokenizer_of_the_codec():
    random = torch.Generator().manual_seed(0)
    waveforms = [0.1 * torch.randn(length, generator=random) for length in (0, 100, 1279, 1280, 1281, 9000)]
    for ours, theirs in zip(
        MelFSQ("demo:audio/codec").encode(waveforms), MelTokenizer().encode(waveforms), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("frames_per_token", [1, 3])
def test_features_count_and_codes_agree(frames_per_token: int):
    torch.manual_seed(0)
    tokenizer = MelFSQ(sizes=replace(FSQ, frames_per_token=frames_per_token)).eval()
    for samples in (0, 31, 32, 96, 97, 700):
        wave = torch.randn(samples)
        features = tokenizer.features(wave)
        assert len(features) == samples // FSQ.hop_samples
        (speech_tokens,) = tokenizer.encode([wave])
        assert tokenizer.count(len(features)) == len(speech_tokens)
        if len(speech_tokens):
            made = tokenizer(features[None], torch.tensor([len(features)]))
            assert torch.equal(made.tokens[0], speech_tokens)
            torch.testing.assert_close(tokenizer.codebook()[speech_tokens], made.embedding[0])


def test_a_directory_gives_it_back(tmp_path: Path):
    torch.manual_seed(1)
    tokenizer = MelFSQ(sizes=replace(FSQ, levels=(4, 3, 2), shrink=0.9))
    tokenizer.save(tmp_path / "fsq")
    again = MelFSQ(str(tmp_path / "fsq"))
    assert again.sizes == tokenizer.sizes
    assert again.codebook_size == 24
    waves = [torch.randn(900), torch.randn(400)]
    assert all(torch.equal(a, b) for a, b in zip(again.encode(waves), tokenizer.encode(waves), strict=True))
    assert all(value.requires_grad for value in again.parameters())


def test_exactly_one_of_directory_and_sizes(tmp_path: Path):
    for given in ({}, {"directory": "demo:audio/codec", "sizes": FSQSizes()}):
        with pytest.raises(ValueError, match="exactly one"):
            MelFSQ(**given)
    with pytest.raises(ValueError, match=r"model directory with config\.json"):
        MelFSQ(str(tmp_path))

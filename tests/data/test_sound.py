# SPDX-License-Identifier: Apache-2.0
"""Rows as sound: recordings and spoken speech tokens, placeholders, speaker vectors, faults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_sound import FSQ, TOKEN_SAMPLES, VOICES, Tones, save_recordings, spoken_rows, tones

from tts_align.batch import Reads
from tts_align.data.manifest import read_manifest, write_manifest
from tts_align.data.records import ManifestError, Pair, Row, Sound
from tts_align.data.select import select
from tts_align.data.sound import PLACEHOLDER, AcousticMel, FeatureExtractor, collate_recordings
from tts_align.models.base.vocoder import Vocoder
from tts_align.models.codec.log_mel import LogMel
from tts_align.models.codec.mel_fsq import MelFSQ
from tts_align.models.cosyvoice.s3.files import S3Sizes
from tts_align.models.cosyvoice.s3.tokenizer import S3Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> MelFSQ:
    torch.manual_seed(0)
    return MelFSQ(sizes=FSQ)


def test_codes_are_spoken_and_recordings_are_read(tokenizer: MelFSQ, tmp_path: Path):
    """Both ways give the features of the same waveform, up to the 16 bits of a file and half precision."""
    rows = spoken_rows(sentences=5)
    speech_tokens = read_manifest(write_manifest(rows, tmp_path / "codes.jsonl"))
    files = read_manifest(save_recordings(tmp_path, rows))
    log_mel = LogMel(FSQ.sample_rate, FSQ.window_samples, FSQ.hop_samples, FSQ.mel_channels)
    spoken_items, spoken = FeatureExtractor(tokenizer, Tones(), batch_size=2).extract(
        select(speech_tokens.rows, Reads.SPEECH), speech_tokens
    )
    read_items, read = FeatureExtractor(tokenizer).extract(select(files.rows, Reads.SPEECH), files)
    for row, one, other in zip(rows, spoken, read, strict=True):
        wave = torch.nn.functional.pad(tones(row.speech, row.speaker), (0, 3 * FSQ.window_samples))
        expected = log_mel(wave[None])[0, : len(row.speech) * FSQ.frames_per_token]
        torch.testing.assert_close(one.features.float(), expected, atol=2e-3, rtol=2e-3)
        # 16 bits disturb what is next to silent, which the logarithm magnifies.
        assert (other.features.float() - expected).abs().mean() < 0.05
        assert one.token_count == other.token_count == len(row.speech)
    for items in (spoken_items, read_items):
        assert [item[0].sound.speech for item in items] == [(PLACEHOLDER,) * len(row.speech) for row in rows]
        assert all(item[0].desirable for item in items)


class Counting(Tones):
    """Counts what it speaks."""

    def __init__(self) -> None:
        super().__init__()
        self.spoken = 0

    def speak(self, speech, speakers):
        self.spoken += len(speech)
        return super().speak(speech, speakers)


def test_the_same_speech_is_heard_once(tokenizer: MelFSQ, tmp_path: Path):
    rows = spoken_rows(sentences=3)
    rows += [replace(row, id=f"{row.id} again", text=row.text + "a") for row in rows]
    rows.append(replace(rows[0], id="other voice", speaker=VOICES[1]))
    manifest = read_manifest(write_manifest(rows, tmp_path / "rows.jsonl"))
    vocoder = Counting()
    _, heard = FeatureExtractor(tokenizer, vocoder).extract(select(manifest.rows, Reads.SPEECH), manifest)
    assert vocoder.spoken == 4
    assert len(heard) == 7
    assert torch.equal(heard[0].features, heard[3].features)
    assert not torch.equal(heard[0].features, heard[6].features)


def test_of_a_pair_the_chosen_one_is_heard(tokenizer: MelFSQ, tmp_path: Path):
    pair = Pair(Sound((1, 2, 3)), Sound((4, 5, 6)))  # their placeholders are alike
    row = Row(id="a", text="ab", speaker="ann", pair=pair)
    manifest = read_manifest(write_manifest([row], tmp_path / "rows.jsonl"))
    items, _ = FeatureExtractor(tokenizer, Tones()).extract(select(manifest.rows, Reads.LABELLED), manifest)
    chosen, rejected = (item[0] for item in items)
    assert chosen.transcript == "ab"
    assert rejected.transcript is None


def test_what_rows_without_a_transcript_say():
    """The text, where the speech is good or unlabelled; nobody knows where it is bad."""
    for label, said in ((True, "ab"), (None, "ab"), (False, None)):
        row = Row(id="a", text="ab", speech=(1,), desirable=label)
        ((item,),) = select([row], Reads.ANY)
        assert item.transcript == said


def test_recordings_are_padded_with_zeros(tokenizer: MelFSQ, tmp_path: Path):
    rows = [replace(row, speaker_vector=(1.0, float(i))) for i, row in enumerate(spoken_rows(sentences=4))]
    manifest = read_manifest(write_manifest(rows, tmp_path / "rows.jsonl"))
    acoustic = AcousticMel(sample_rate=8000, fft_samples=128, hop_samples=64, mel_channels=5, fmax=2000.0)
    _, heard = FeatureExtractor(tokenizer, Tones(), acoustic).extract(select(manifest.rows, Reads.SPEECH), manifest)
    batch = collate_recordings(heard)
    counts = [len(row.speech) for row in rows]
    assert batch.token_counts == tuple(counts)
    assert batch.frames.tolist() == [2 * count for count in counts]
    # Twice the rate, twice the hop: as many frames.
    assert batch.mel_mask.sum(1).tolist() == batch.frames.tolist()
    assert batch.mel.shape == (4, 2 * max(counts), 5)
    assert batch.speaker.tolist() == [[1.0, float(i)] for i in range(4)]
    for i, one in enumerate(heard):
        assert (batch.features[i, len(one.features) :] == 0).all()
        np.testing.assert_array_equal(batch.features[i, : len(one.features)].numpy(), one.features.float().numpy())
    odd = (heard[0], replace(heard[1], speaker=()))
    with pytest.raises(ValueError, match="speaker_vector in all rows"):
        collate_recordings(odd)


class Mute(Vocoder):
    """Says nothing."""

    sample_rate = FSQ.sample_rate

    def speak(self, speech, speakers):
        return [torch.zeros(3) for _ in speech]


def test_faults_name_the_rows(tokenizer: MelFSQ, tmp_path: Path):
    manifest = read_manifest(write_manifest(spoken_rows(sentences=2), tmp_path / "rows.jsonl"))
    items = select(manifest.rows, Reads.SPEECH)
    with pytest.raises(
        ManifestError, match=r"2 utterances: has speech tokens of another tokenizer only.*data\.vocoder"
    ):
        FeatureExtractor(tokenizer).extract(items, manifest)
    with pytest.raises(ManifestError, match="row '0-a-0': too short to give a speech token"):
        FeatureExtractor(tokenizer, Mute()).extract(items, manifest)
    files = read_manifest(save_recordings(tmp_path), check_audio=False)
    (tmp_path / files.rows[0].audio).unlink()
    with pytest.raises(ManifestError, match="no such recording"):
        FeatureExtractor(tokenizer).extract(select(files.rows, Reads.SPEECH), files)


def test_the_published_tokenizer_hears_too(tmp_path: Path):
    """An S3 tokenizer as part of a training: its features, its count, the speech tokens that `encode` gives."""
    torch.manual_seed(3)
    sizes = S3Sizes(mel_channels=128, width=32, heads=2, layers=1, levels=(3, 3), kernel_size=5, embedding_channels=6)
    tokenizer = S3Tokenizer(sizes).eval()
    for samples in (399, 400, 1600, 5000, 16000, 16001):
        wave = 0.1 * torch.randn(samples)
        features = tokenizer.features(wave)
        (speech_tokens,) = tokenizer.encode([wave])
        assert tokenizer.count(len(features)) == len(speech_tokens)
        if len(speech_tokens):
            made = tokenizer(features[None], torch.tensor([len(features)]))
            assert torch.equal(made.tokens[0], speech_tokens)
    assert TOKEN_SAMPLES == 64


def test_a_decoder_that_speaks_the_tokenizers_features_hands_them_on_as_they_are(tmp_path: Path) -> None:
    """The embedded codec's decoder and tokenizer: no Griffin-Lim between them, so most tokens come back the same."""
    from tts_align.models.codec.mel_fsq import FSQSizes, MelFSQ
    from tts_align.models.codec.vocoder import MelVocoder

    manifest = read_manifest("demo:audio/dev.parquet")
    items = select(manifest.rows, Reads.SPEECH)[:12]
    tokenizer, vocoder = MelFSQ("demo:audio/codec").eval(), MelVocoder("demo:audio/codec")
    placed, sounds = FeatureExtractor(tokenizer, vocoder).extract(items, manifest)
    same = count = 0
    for (one,), row, (before,) in zip(placed, sounds, items, strict=True):
        speech = torch.tensor(before.sound.speech)
        assert row.token_count == len(one.sound.speech) == len(speech)
        log_mel, _ = vocoder.log_mel([speech], vocoder.codec.speaker_index([before.row.speaker]))
        torch.testing.assert_close(row.features.float(), log_mel[0], rtol=1e-3, atol=2e-3)
        made = tokenizer(row.features[None].float(), torch.tensor([len(row.features)]))
        same, count = same + int((made.tokens[0] == speech).sum()), count + len(speech)
    assert same / count > 0.9
    other = MelFSQ(sizes=FSQSizes(mel_channels=40))
    assert vocoder.features(other, [torch.tensor([1, 2])], ["sakura"]) is None

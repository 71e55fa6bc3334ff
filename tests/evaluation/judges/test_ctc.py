# SPDX-License-Identifier: Apache-2.0
import itertools
import math

import pytest
import torch

from tts_align.evaluation.judges.base import Expected, Reading, SpeechSample
from tts_align.evaluation.judges.ctc import CTCJudge, Hearing, KanaRecogniser, RecogniserSizes, said_reading, verdict

READINGS = {"からい": "なべわからいよ", "つらい": "なべわつらいよ"}
SIZES = RecogniserSizes("なべわからいつよ", mel_channels=20, hidden_channels=16, blocks=2, kernel_size=3)


@pytest.fixture
def recogniser() -> KanaRecogniser:
    torch.manual_seed(0)
    return KanaRecogniser(SIZES).eval()


def test_likelihood_is_the_sum_over_all_alignments(recogniser):
    """Enumerate all 9^4 paths of four positions, collapse each by hand, and add up those that spell the text."""
    log_probs = torch.randn(1, 4, 9, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    total = {"な": 0.0, "べべ": 0.0, "わか": 0.0}
    for path in itertools.product(range(9), repeat=4):
        kept = [c for c, _ in itertools.groupby(path) if c]
        text = "".join(SIZES.alphabet[c - 1] for c in kept)
        if text in total:
            total[text] += math.exp(sum(log_probs[0, t, c].item() for t, c in enumerate(path)))
    for text, probability in total.items():
        got = recogniser.likelihoods(log_probs, torch.tensor([4]), [text]).item()
        assert got == pytest.approx(math.log(probability), abs=1e-4)


def test_text_longer_than_the_sound_is_very_unlikely(recogniser):
    log_probs = torch.zeros(1, 3, 9).log_softmax(-1)
    assert recogniser.likelihoods(log_probs, torch.tensor([3]), ["なべわから"]).item() == -1e4


def test_greedy_transcript_collapses_repeats_but_not_across_a_blank(recogniser):
    path = [0, 1, 1, 0, 1, 2, 2, 0, 0, 3]
    log_probs = torch.nn.functional.one_hot(torch.tensor(path), 9).float()
    assert recogniser._greedy(log_probs) == "ななべわ"


def test_span_reaches_from_the_first_kana_to_the_one_after(recogniser):
    """Kana i begins at 2 + 4 i of 40; からい is kana 3 to 5, よ after it kana 6: from 14 to 26."""
    text = READINGS["からい"]
    log_probs = torch.full((40, 9), -20.0)
    log_probs[:, 0] = 0.0
    for place, index in enumerate(recogniser.indices(text)):
        log_probs[2 + 4 * place, 0] = -20.0
        log_probs[2 + 4 * place, index] = 0.0
    assert recogniser._share(log_probs, READINGS, {"からい": 0.0, "つらい": -9.0}) == (14 / 40, 26 / 40)


@pytest.mark.parametrize(
    ("transcript", "said"),
    [
        ("なべわからいよ", "からい"),
        ("なわからいよ", "からい"),  # another word is broken
        ("なべわあからいよ", "からい"),  # what stands before belongs to the word before
        ("なべわからい", "からい"),
        ("なべわくらいよ", None),
        ("なべわかあらいよ", None),  # something inside
        ("なべわかいよ", None),
        ("なべわつらいよ", None),  # the likelihood and the transcript disagree
        ("", None),
    ],
)
def test_neither_reading_when_the_transcript_does_not_spell_it_in_place(transcript, said):
    assert said_reading(transcript, READINGS, {"からい": -1.0, "つらい": -2.0}) == said


@pytest.mark.parametrize(
    ("transcript", "scores", "right", "reading", "errors", "margin"),
    [
        ("なべわからいよ", (-1.0, -5.0), "からい", Reading.RIGHT, (0, 0), 4.0),
        ("なべわつらいよ", (-7.0, -2.0), "からい", Reading.WRONG, (1 / 7, 0), -5.0),
        ("なべわくらいよ", (-3.0, -4.0), "からい", Reading.NEITHER, (1 / 7, 1 / 7), 1.0),
        ("わつらいよ", (-7.0, -2.0), "つらい", Reading.RIGHT, (2 / 7, 2 / 7), 5.0),
    ],
)
def test_verdict(transcript, scores, right, reading, errors, margin):
    likelihoods = dict(zip(READINGS, scores, strict=True))
    hearing = Hearing(transcript, likelihoods, said_reading(transcript, READINGS, likelihoods), (0.4, 0.8))
    got = verdict(hearing, Expected("鍋は辛いよ", READINGS, (right,)))
    assert got.reading is reading
    assert (got.cer, got.nearest_cer) == pytest.approx(errors)
    assert got.margin == margin
    assert got.target_share == (0.4, 0.8)


def test_sentence_without_a_marked_word():
    got = verdict(Hearing("なべよ", {}, None, None), Expected("鍋よ", {"": "なべわよ"}))
    assert got.reading is Reading.UNMARKED
    assert got.cer == got.nearest_cer == 0.25
    assert math.isnan(got.margin)


def test_verdicts_do_not_depend_on_the_batch(tmp_path, recogniser):
    recogniser.save(tmp_path)
    judge, generator = CTCJudge(str(tmp_path), batch_size=2), torch.Generator().manual_seed(4)
    sounds = [torch.randn(length, generator=generator) * 0.1 for length in (9000, 200, 4000)]
    heard = [SpeechSample(torch.zeros(0, dtype=torch.long), sound, 16000) for sound in sounds]
    expected = Expected("鍋は辛いよ", READINGS, ("からい",))
    together = judge.judge(heard, [expected] * 3)
    for one, verdict_together in zip(heard, together, strict=True):
        alone = judge.judge([one], [expected])[0]
        assert (alone.transcript, alone.reading, alone.cer) == (
            verdict_together.transcript,
            verdict_together.reading,
            verdict_together.cer,
        )
        assert alone.margin == pytest.approx(verdict_together.margin, abs=1e-3)


def test_faults_are_named(tmp_path, recogniser):
    recogniser.save(tmp_path)
    judge, silence = CTCJudge(str(tmp_path)), torch.zeros(4000)
    speech_tokens = torch.zeros(0, dtype=torch.long)
    with pytest.raises(ValueError, match="vocoder"):
        judge.judge([SpeechSample(speech_tokens, None, 0)], [Expected("x", READINGS, ("からい",))])
    with pytest.raises(ValueError, match="辛"):
        judge.judge([SpeechSample(speech_tokens, silence, 16000)], [Expected("x", {"からい": "辛い"}, ("からい",))])
    with pytest.raises(ValueError, match="no transcript"):
        judge.judge([SpeechSample(speech_tokens, silence, 16000)], [Expected("x")])


def test_sound_of_another_rate_is_resampled(tmp_path, recogniser):
    recogniser.save(tmp_path)
    judge = CTCJudge(str(tmp_path))
    heard = SpeechSample(
        torch.zeros(0, dtype=torch.long), torch.randn(24000, generator=torch.Generator().manual_seed(0)), 24000
    )
    assert len(judge._waveform(heard)) == 16000


def test_a_recogniser_learns_two_tones():
    """High tone か, low tone つ: enough steps and greedy decoding tells them apart."""
    torch.manual_seed(0)
    recogniser = KanaRecogniser(SIZES)
    time = torch.arange(3200) / 16000
    tones = {"か": torch.sin(2 * torch.pi * 2000 * time) * 0.3, "つ": torch.sin(2 * torch.pi * 300 * time) * 0.3}
    log_mel = recogniser.features(torch.stack(list(tones.values())))
    optimizer = torch.optim.AdamW(recogniser.parameters(), lr=1e-2)
    for _ in range(60):
        loss = recogniser.loss(log_mel, torch.tensor([20, 20]), list(tones))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    recogniser.eval()
    assert recogniser.transcribe(list(tones.values())) == ["か", "つ"]

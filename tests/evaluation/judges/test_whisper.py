# SPDX-License-Identifier: Apache-2.0
"""Whisper as a judge, on tiny models made here and with every socket closed."""

from __future__ import annotations

import logging
import math
import pickle
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_whisper import convert, save_whisper

from tts_align.data.records import Span
from tts_align.evaluation.judges import whisper
from tts_align.evaluation.judges.base import Expected, Reading, SpeechSample
from tts_align.evaluation.judges.recogniser import ReadingRules, quiet_cuts
from tts_align.evaluation.judges.weights import MissingWeightsError
from tts_align.evaluation.judges.whisper import WhisperJudge

SPAN = Span(6, 8, ("からい",), ("つらい",))
SENTENCE = Expected("このカレーは辛い。", right=("からい",), spans=(SPAN,), language="ja")
EVERYTHING = ReadingRules(min_margin=0.0, max_cer=math.inf)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whisper(tmp_path_factory.mktemp("whisper") / "stored")


@pytest.fixture(scope="module")
def converted(stored: Path) -> Path:
    return convert(stored, stored.parent / "converted")


@pytest.fixture(scope="module")
def sounds() -> list[SpeechSample]:
    generator = torch.Generator().manual_seed(0)
    lengths = (16_000, 30_000, 8_000)
    noise = [0.1 * torch.randn(length, generator=generator) for length in lengths]
    return [SpeechSample(torch.zeros(0, dtype=torch.long), one, 16_000) for one in noise]


@pytest.fixture(scope="module")
def judges(stored: Path, converted: Path) -> dict[str, WhisperJudge]:
    few = {"max_tokens": 12, "batch_size": 2, "readings": EVERYTHING}
    return {folder.name: WhisperJudge(str(folder), **few) for folder in (stored, converted)}  # type: ignore[arg-type]


def test_both_libraries_hear_the_same(judges: dict[str, WhisperJudge], sounds: list[SpeechSample]) -> None:
    one, other = (judge.judge(sounds, [SENTENCE] * 3) for judge in judges.values())
    for mine, its in zip(one, other, strict=True):
        assert (mine.transcript, mine.reading, mine.cer) == (its.transcript, its.reading, its.cer)
        assert mine.readings == pytest.approx(its.readings, abs=1e-3)
        assert mine.margin == pytest.approx(mine.readings["からい"] - mine.readings["つらい"])
    assert len({verdict.margin for verdict in one}) == 3
    assert judges["stored"].engine.name == "transformers"
    assert judges["converted"].engine.name == "CTranslate2"


def slow_score(folder: Path, sound: torch.Tensor, texts: Sequence[str]) -> float:
    """log of the sum over texts of the product of p(token | tokens before, sound), token by token, text tokens only."""
    from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    features = WhisperFeatureExtractor.from_pretrained(folder)(sound.numpy(), sampling_rate=16_000, return_tensors="pt")
    names = ("<|startoftranscript|>", "<|ja|>", "<|transcribe|>", "<|notimestamps|>")
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    probability = 0.0
    for text in texts:
        said = tokenizer.convert_tokens_to_ids(names)
        logp = 0.0
        for token in tokenizer.encode(text, add_special_tokens=False):
            with torch.no_grad():
                logits = model(features.input_features, decoder_input_ids=torch.tensor([said])).logits[0, -1, :end]
            logp += float(logits.double().log_softmax(-1)[token])
            said.append(token)
        probability += math.exp(logp + 100)
    return math.log(probability) - 100


def test_scores_are_those_of_a_slow_pass_token_by_token(
    judges: dict[str, WhisperJudge], sounds: list[SpeechSample], stored: Path
) -> None:
    """Hiragana and katakana of a reading are added up, and what silence gives is taken away."""
    sound = sounds[1].waveform
    assert sound is not None
    expected = Expected("辛い。", right=("からい",), spans=(Span(0, 2, ("からい",), ("つらい",)),))
    verdict = WhisperJudge(str(stored), "ja", max_tokens=2, readings=EVERYTHING).judge([sounds[1]], [expected])[0]
    texts = {"からい": ("からい。", "カライ。"), "つらい": ("つらい。", "ツライ。")}
    silence = torch.zeros(1)
    slow = {name: slow_score(stored, sound, one) - slow_score(stored, silence, one) for name, one in texts.items()}
    assert verdict.readings == pytest.approx(slow, abs=1e-3)


@pytest.mark.parametrize("name", ["stored", "converted"])
def test_verdicts_do_not_depend_on_the_batch(
    judges: dict[str, WhisperJudge], sounds: list[SpeechSample], name: str
) -> None:
    together = judges[name].judge(sounds, [SENTENCE] * 3)
    for sound, verdict in zip(sounds, together, strict=True):
        alone = judges[name].judge([sound], [SENTENCE])[0]
        assert (alone.transcript, alone.cer) == (verdict.transcript, verdict.cer)
        assert alone.margin == pytest.approx(verdict.margin, abs=1e-3)


def test_below_the_margin_it_abstains_and_what_is_not_understood_has_no_reading(
    converted: Path, sounds: list[SpeechSample]
) -> None:
    wide = ReadingRules(min_margin=1e3, max_cer=math.inf)
    unsure = WhisperJudge(str(converted), max_tokens=2, readings=wide).judge(sounds[:1], [SENTENCE])[0]
    assert unsure.reading is Reading.ABSTAINED
    assert unsure.abstained
    assert math.isfinite(unsure.margin)
    lost = WhisperJudge(str(converted), max_tokens=2, readings=ReadingRules(0.0)).judge(sounds[:1], [SENTENCE])[0]
    assert lost.reading is Reading.NEITHER
    assert lost.cer == 1.0


def test_a_sentence_without_a_marked_word(judges: dict[str, WhisperJudge], sounds: list[SpeechSample]) -> None:
    verdict = judges["converted"].judge(sounds[:1], [Expected("なべ", {"": "なべ"}, language="ja-JP")])[0]
    assert verdict.reading is Reading.UNMARKED
    assert verdict.readings == {}
    assert math.isnan(verdict.margin)


def test_long_recordings_are_cut_or_fail_by_name(converted: Path) -> None:
    sound = SpeechSample(torch.zeros(0, dtype=torch.long), torch.zeros(31 * 24_000), 24_000)
    cut = WhisperJudge(str(converted), max_tokens=2, readings=EVERYTHING).judge([sound], [SENTENCE])[0]
    assert cut.reading is Reading.ABSTAINED, "no reading is told apart over two windows"
    with pytest.raises(ValueError, match=r"lasts 31.0 s, and the recogniser hears 30 s at once"):
        WhisperJudge(str(converted), long_audio="fail").judge([sound], [SENTENCE])


def test_a_cut_falls_where_it_is_quiet() -> None:
    sound = torch.ones(70_000)
    sound[27_300:28_000] = 0
    pieces = quiet_cuts(sound, 30_000)
    assert torch.equal(torch.cat(pieces), sound)
    assert 27_300 <= len(pieces[0]) <= 28_000
    assert all(0 < len(piece) <= 30_000 for piece in pieces)


@pytest.mark.parametrize("held", [("model.bin",), ("model.safetensors",), ()])
def test_missing_weights_say_what_to_fetch(tmp_path: Path, held: tuple[str, ...]) -> None:
    folder = tmp_path / "whisper"
    if held:
        folder.mkdir()
    for name in held:
        (folder / name).touch()
    with pytest.raises(MissingWeightsError) as caught:
        WhisperJudge(str(folder))
    said = str(caught.value)
    assert f"hf download Systran/faster-whisper-large-v3 --local-dir {folder}" in said
    assert f"hf download openai/whisper-large-v3 --local-dir {folder}" in said
    assert "model.judge.init_args.model" in said
    assert ("is not there" in said) == (not held)
    assert ("generation_config.json" in said) == (held == ("model.safetensors",))


def test_unknown_language(converted: Path, sounds: list[SpeechSample]) -> None:
    with pytest.raises(ValueError, match=r"language of 'なべ' is not known: set model\.judge\.init_args\.language"):
        WhisperJudge(str(converted)).judge(sounds[:1], [Expected("なべ")])


@pytest.mark.parametrize(
    ("formats", "fault", "library", "device"),
    [
        (("ctranslate2", "transformers"), "", whisper.CTranslate2Whisper, "cuda"),
        (("ctranslate2", "transformers"), "no cuBLAS", whisper.TransformersWhisper, "cuda"),
        (("ctranslate2",), "no cuBLAS", whisper.CTranslate2Whisper, "cpu"),
        (("transformers",), "", whisper.TransformersWhisper, "cuda"),
    ],
)
def test_the_library_follows_the_device_and_the_folder(
    converted: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    formats: tuple[str, ...],
    fault: str,
    library: type,
    device: str,
) -> None:
    judge = WhisperJudge(str(converted))
    judge._formats = formats
    monkeypatch.setattr(whisper, "gpu_fault", lambda: fault)
    with caplog.at_level(logging.WARNING):
        kind, where, why = judge._chosen(torch.device("cuda", 0))
    assert (kind, where.type) == (library, device)
    assert bool(fault) == (fault in why if fault else False)
    assert ("slow" in caplog.text) == (bool(fault) and device == "cpu")


def test_the_choice_is_said(stored: Path, sounds: list[SpeechSample], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="tts_align"):
        WhisperJudge(str(stored), max_tokens=2).judge(sounds[:1], [SENTENCE])
    assert "WhisperJudge hears with transformers on cpu: the folder has no model.bin" in caplog.text


def test_identity_goes_by_the_weights_and_not_by_the_place(converted: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in converted.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    one, other = WhisperJudge(str(converted)), WhisperJudge(str(moved), batch_size=3)
    mine, its = one.identity(), other.identity()
    assert {**mine, "model": ""} == {**its, "model": ""}
    assert one.same_as(other)
    (moved / "model.bin").write_bytes((moved / "model.bin").read_bytes()[:-1] + b"\1")
    assert not one.same_as(WhisperJudge(str(moved)))
    wide = WhisperJudge(str(converted), readings=ReadingRules(min_margin=3.0))
    assert wide.identity()["arguments"] != mine["arguments"]


def test_it_can_be_sent_to_another_process(judges: dict[str, WhisperJudge], sounds: list[SpeechSample]) -> None:
    judge = judges["converted"]
    before = judge.judge(sounds[:1], [SENTENCE])
    assert pickle.loads(pickle.dumps(judge)).judge(sounds[:1], [SENTENCE]) == before


def test_a_whisper_that_writes_kana(converted: Path, sounds: list[SpeechSample]) -> None:
    """The candidates are the sentence in kana, of which hiragana and katakana are added up."""
    kana = WhisperJudge(str(converted), script="kana", max_tokens=2, readings=EVERYTHING)
    expected = Expected("鍋", {"からい": "なべわからい", "つらい": "なべわつらい"}, ("からい",), language="ja")
    verdict = kana.judge(sounds[:1], [expected])[0]
    assert verdict.readings.keys() == {"からい", "つらい"}
    assert verdict.cer == 1.0


def test_half_precision_is_for_a_gpu(converted: Path, sounds: list[SpeechSample]) -> None:
    with pytest.raises(ValueError, match=r"float16 works on a GPU alone: set model\.judge\.init_args\.precision"):
        WhisperJudge(str(converted), precision="float16").judge(sounds[:1], [SENTENCE])

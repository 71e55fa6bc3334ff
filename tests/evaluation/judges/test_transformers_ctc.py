# SPDX-License-Identifier: Apache-2.0
"""CTC models of transformers as judges: letters, kana, pinyin, phonemes and adapters, on tiny models made here."""

from __future__ import annotations

import math
import pickle
import shutil
from collections.abc import Sequence
from itertools import groupby, product
from pathlib import Path

import pytest
import torch
from tiny_ctc import save_ctc, teach, tone

from tts_align.data.records import Span
from tts_align.evaluation.judges.alphabet import Alphabet, read_alphabet, written_by
from tts_align.evaluation.judges.base import Expected, Reading, SpeechSample
from tts_align.evaluation.judges.recogniser import ReadingRules
from tts_align.evaluation.judges.transformers_ctc import TransformersCTCJudge
from tts_align.evaluation.judges.weights import MissingWeightsError
from tts_align.evaluation.readings.spelling import Script

KANA = list("からいつのべ")
SENTENCE = Expected("べの辛い", right=("からい",), spans=(Span(2, 4, ("からい",), ("つらい",)),), language="ja")
EVERYTHING = ReadingRules(min_margin=0.0, max_cer=math.inf)


def sample(sound: torch.Tensor) -> SpeechSample:
    return SpeechSample(torch.zeros(0, dtype=torch.long), sound, 16_000)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teach(save_ctc(tmp_path_factory.mktemp("ctc") / "kana", KANA), KANA)


def test_it_hears_which_reading_was_said(taught: Path) -> None:
    judge = TransformersCTCJudge(str(taught))
    said = ["べのからい", "べのつらい", "べのつらい", "べのからい"]
    verdicts = judge.judge([sample(tone(text, KANA, seed)) for seed, text in enumerate(said, 900)], [SENTENCE] * 4)
    assert [verdict.transcript for verdict in verdicts] == said
    assert [verdict.reading for verdict in verdicts] == [Reading.RIGHT, Reading.WRONG, Reading.WRONG, Reading.RIGHT]
    assert [verdict.margin > 1 for verdict in verdicts] == [True, False, False, True]
    assert [verdict.cer for verdict in verdicts] == [0, 0.2, 0.2, 0]
    assert all(verdict.nearest_cer == 0 for verdict in verdicts)
    assert judge.script is Script.KANA


def test_what_says_neither_has_no_reading(taught: Path) -> None:
    judge = TransformersCTCJudge(str(taught))
    assert judge.judge([sample(tone("いいい", KANA))], [SENTENCE])[0].reading is Reading.NEITHER


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_verdicts_do_not_depend_on_the_batch(tmp_path: Path, norm: str) -> None:
    judge = TransformersCTCJudge(str(save_ctc(tmp_path / "ctc", KANA, norm)), readings=EVERYTHING)
    samples = [sample(tone(text, KANA)) for text in ("べのからい", "い", "べのつらいい")]
    together = judge.judge(samples, [SENTENCE] * 3)
    for one, verdict in zip(samples, together, strict=True):
        alone = judge.judge([one], [SENTENCE])[0]
        assert (alone.transcript, alone.cer) == (verdict.transcript, verdict.cer)
        assert alone.margin == pytest.approx(verdict.margin, abs=2e-3, nan_ok=True)


def test_the_likelihood_is_the_sum_over_all_alignments(taught: Path) -> None:
    """Every path of four frames over six letters and the blank, collapsed by hand."""
    judge = TransformersCTCJudge(str(taught))
    logps = torch.randn(4, 11, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    numbers = [0, *(judge.alphabet.ids[letter] for letter in KANA)]
    texts = ("から", "いい", "べ")
    wanted = dict.fromkeys(texts, 0.0)
    for path in product(numbers, repeat=4):
        text = judge.alphabet.text([number for number, _ in groupby(path) if number])
        if text in wanted:
            wanted[text] += math.exp(sum(float(logps[t, number]) for t, number in enumerate(path)))
    found = judge.score(logps, [*texts, "からいべの"])
    assert found[:3] == pytest.approx([math.log(one) for one in wanted.values()], abs=1e-4)
    assert found[3] == -math.inf, "five letters do not fit into four frames"


def test_letters_that_it_does_not_write_must_be_missing_in_all_candidates(taught: Path) -> None:
    judge = TransformersCTCJudge(str(taught))
    logps = torch.zeros(20, 11).log_softmax(-1)
    scores = judge.score(logps, ["鍋のから", "鍋のつら", "鍋のXら"])
    assert all(map(math.isfinite, scores[:2]))
    assert scores[2] == -math.inf


def test_silence_may_be_taken_away(taught: Path) -> None:
    plain = TransformersCTCJudge(str(taught), readings=EVERYTHING)
    less = TransformersCTCJudge(str(taught), readings=ReadingRules(0.0, subtract_unheard=True, max_cer=math.inf))
    sounds = [tone("べのからい", KANA), tone("べのつらい", KANA)]
    quiet = plain.judge([sample(torch.zeros(len(sounds[0])))], [SENTENCE])[0]
    for sound in sounds:
        heard, left = (judge.judge([sample(sound)], [SENTENCE])[0].readings for judge in (plain, less))
        for reading in heard:
            assert left[reading] == pytest.approx(heard[reading] - quiet.readings[reading], abs=1e-3)


def test_adapters_of_a_model_of_many_languages(tmp_path: Path) -> None:
    """MMS: an adapter and letters of its own for each language."""
    letters: dict[str, Sequence[str]] = {"jpn": KANA, "eng": list("abc")}
    folder = save_ctc(tmp_path / "mms", letters, adapters=True)
    japanese, english = (TransformersCTCJudge(str(folder), target_language=one, readings=EVERYTHING) for one in letters)
    sound = sample(tone("べのからい", KANA))
    assert japanese.judge([sound], [SENTENCE])[0].readings.keys() == {"からい", "つらい"}
    assert english.judge([sound], [Expected("abc", language="en")])[0].reading is Reading.UNMARKED
    assert english.loaded.lm_head.out_features == 8
    assert not japanese.same_as(english)
    with pytest.raises(ValueError, match=r"letters of several languages.*target_language to be one of eng, jpn"):
        TransformersCTCJudge(str(folder))
    with pytest.raises(MissingWeightsError, match=r"lacks adapter.fra.safetensors"):
        TransformersCTCJudge(str(folder), target_language="fra")


def test_hubert_that_writes_phonemes(tmp_path: Path) -> None:
    """English heteronyms, of which letters tell nothing; the vocabulary is in IPA, the lexicon in ARPAbet."""
    phonemes = ["ɹ", "ɛ", "iː", "d", "aɪ", "ɪ", "t", "ə", "ʃ", "ŋ", "ʊ", "θ"]
    lexicon = tmp_path / "words.dict"
    lexicon.write_text("i AY1\nit IH1 T\n")
    rules = ReadingRules(0.0, max_cer=math.inf, lexicon=lexicon)
    judge = TransformersCTCJudge(str(save_ctc(tmp_path / "hubert", phonemes, kind="hubert")), readings=rules)
    expected = Expected(
        "I read it.", right=("R EH1 D",), spans=(Span(2, 6, ("R EH1 D",), ("R IY1 D",)),), language="en"
    )
    verdict = judge.judge([sample(tone("べのからい", KANA))], [expected])[0]
    assert judge.script is Script.PHONEMES
    assert judge.reference("AY1 R EH1 D IH1 T") == "aɪ ɹ ɛ d ɪ t"
    assert set(verdict.readings) == {"R EH1 D", "R IY1 D"}
    assert verdict.margin == pytest.approx(verdict.readings["R EH1 D"] - verdict.readings["R IY1 D"])


@pytest.mark.parametrize(
    ("tokens", "script"),
    [
        (["zhang3", "chang2", *(f"{one}{tone}" for one in ("ma", "shi", "lü", "er", "a") for tone in "1234")],
         "pinyin"),
        (["AA0", "AE1", "AH0", "AO1", "AW", "AY", "CH", "DH", "EH1", "ER0", "EY1", "HH", "IH", "IY1", "JH", "NG", "OW",
          "OY", "SH", "TH", "UH", "UW"], "phonemes"),
        (list("abcdefghijklmnopqrstuvwxyz'"), "written"),
        (list("あいうカキ辛い"), "written"),
        (list("あいうカキー"), "kana"),
    ],
)  # fmt: skip
def test_the_script_is_found_out_from_the_vocabulary(tokens: list[str], script: str) -> None:
    assert written_by(dict.fromkeys(tokens, 0)) is Script(script)


def test_pinyin_is_spelled_as_the_vocabulary_has_it() -> None:
    def spelled(*tokens: str) -> tuple[list[str], list[str]]:
        return Alphabet({token: place for place, token in enumerate(tokens, 1)}, 0, "", Script.PINYIN).spell(
            "lv4 zhang3"
        )

    assert spelled("lü4", "zhang3") == (["lü4", "zhang3"], [])
    assert spelled("lv4", "zhang") == (["lv4", "zhang"], [])
    assert spelled("l", "v4", "zh", "ang3") == (["l", "v4", "zh", "ang3"], [])
    assert spelled("lv4") == (["lv4"], ["zhang3"])
    letters = Alphabet({letter: place for place, letter in enumerate("lv4zhang3", 1)}, 0, "", Script.PINYIN)
    assert letters.spell("lv4")[0] == ["l", "v", "4"]


def test_words_are_spelled_with_what_stands_between_them(tmp_path: Path) -> None:
    alphabet = read_alphabet(save_ctc(tmp_path / "ctc", list("ABCIT'")), 0)
    assert alphabet.space == "|"
    tokens, unknown = alphabet.spell("It, a-b xc!")
    assert tokens == ["I", "T", "|", "A", "B", "|", "C"]
    assert unknown == ["x"]
    assert alphabet.text([alphabet.ids[token] for token in tokens]) == "IT AB C"


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("vocab.json", "[1]", "expected names and values in braces, got list"),
        ("vocab.json", "[" * 100_000, "is nested too deeply"),
        ("vocab.json", '{"a": "b"}', "expected the number of each token, got 'b' for 'a'"),
        ("vocab.json", '{"jpn": {"a": null}}', "jpn: expected the number of each token, got None for 'a'"),
        ("vocab.json", '{"jpn": 5, "eng": {}}', "jpn: expected the number of each token, got 5"),
        ("tokenizer_config.json", "[1]", "expected names and values in braces, got list"),
        ("tokenizer_config.json", "{", "not JSON"),
    ],
)
def test_a_spoiled_vocabulary_is_said_in_a_line(tmp_path: Path, name: str, content: str, fault: str) -> None:
    folder = save_ctc(tmp_path / "ctc", list("ABC"))
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}: {fault}"):
        read_alphabet(folder, 0, "jpn")


def test_missing_weights_and_another_process(tmp_path: Path, taught: Path) -> None:
    with pytest.raises(MissingWeightsError, match=r"is not there(.|\n)*hf download facebook/mms-1b-all"):
        TransformersCTCJudge(str(tmp_path / "none"))
    judge = TransformersCTCJudge(str(taught))
    before = judge.judge([sample(tone("べのからい", KANA))], [SENTENCE])
    assert pickle.loads(pickle.dumps(judge)).judge([sample(tone("べのからい", KANA))], [SENTENCE]) == before
    shutil.copytree(taught, tmp_path / "moved")
    assert judge.same_as(TransformersCTCJudge(str(tmp_path / "moved")))

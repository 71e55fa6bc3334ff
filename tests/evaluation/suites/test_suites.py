# SPDX-License-Identifier: Apache-2.0
"""Test sets as their authors lay them out, and every way in which a line can be wrong."""

import json
from contextlib import suppress

import pytest
from killed import Killed, killed_at

from tts_align.evaluation.suites import SUITES, read_suite
from tts_align.evaluation.suites.base import Faults
from tts_align.utils import files
from tts_align.utils.audio import write_wav

ROW = {
    "key": "憧_ショウ_1",
    "text": "強い憧憬が見られる。",
    "tagged_text": "強い<憧>憬が見られる。",
    "yomi": "ツヨイショウケイガミラレル。",
    "tagged_yomi": "ツヨイ<ショウ>ケイガミラレル。",
    "reading_category": "on_yomi",
    "readings": {"natural": ["ショウ", "ドウ"], "marginal": []},
    "source": "original_alt",
}


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def test_seed_lists_of_two_to_five_fields(tmp_path):
    path = write(
        tmp_path / "en" / "meta.lst",
        "a|Hello.",
        "b.wav|Hello.|prompt-wavs/v.wav",
        "c|A prompt.|prompt-wavs/v.wav|Hello.",
        "",
        "d|Another prompt.|prompt-wavs/v.wav|Hello, 'you'.|wavs/d.wav  ",
    )
    suite = read_suite("seed", path)
    assert (suite.name, suite.protocol, suite.languages, suite.has_voices) == ("seed", "seed", ["en"], True)
    a, b, c, d = suite.items
    assert [one.id for one in suite.items] == ["a", "b", "c", "d"]
    assert (a.prompt_audio, a.sentence.speaker) == (None, "")
    assert b.prompt_audio == c.prompt_audio == path.parent / "prompt-wavs" / "v.wav"
    assert [one.prompt_text for one in (b, c, d)] == ["", "A prompt.", "Another prompt."]
    assert [one.sentence.speaker for one in (b, c, d)] == ["v", "v-2", "v-3"]  # other transcripts, other voices
    assert (d.truth_audio, d.sentence.text) == (path.parent / "wavs" / "d.wav", "Hello, 'you'.")
    assert d.where == f"{path}:5"
    assert read_suite("seed", path.parent).items == suite.items


def test_seed_languages(tmp_path):
    path = write(tmp_path / "hard.lst", "a|我爱 AI", "b|AI")
    assert [one.reference.language for one in read_suite("seed", path).items] == ["zh", "en"]
    assert read_suite("seed", path, "zh").languages == ["zh"]
    (tmp_path / "zh").mkdir()
    assert read_suite("seed", write(tmp_path / "zh" / "meta.lst", "b|AI")).languages == ["zh"]


def test_seed_faults_are_named_with_file_and_line(tmp_path):
    path = write(tmp_path / "meta.lst", "a|Hello.", "only", "a|Again.", "../b|Up.", "c| ", "x|1|2|3|4|5")
    with pytest.raises(ValueError, match="meta") as caught:
        read_suite("seed", path)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{path}:2: expected utt|text, ")
    assert lines[0].endswith("got 1 fields")
    assert lines[1:4] == [
        f"{path}:3: utterance 'a' is taken by line 1",
        f"{path}:4: the utterance is named '../b', expected a name that can be a file's",
        f"{path}:5: the text is empty",
    ]
    assert lines[4].endswith("got 6 fields")
    with pytest.raises(ValueError, match=r"no meta.lst: name a list; there are .*other.lst"):
        read_suite("seed", write(tmp_path / "deep" / "other.lst", "a|b").parent)
    with pytest.raises(ValueError, match="holds no sentence"):
        read_suite("seed", write(tmp_path / "empty.lst", ""))
    with pytest.raises(FileNotFoundError, match="there is no test set"):
        read_suite("seed", tmp_path / "none.lst")


def test_twenty_faults_are_shown(tmp_path):
    path = write(tmp_path / "meta.lst", *["only"] * 30)
    with pytest.raises(ValueError, match="and 10 more"):
        read_suite("seed", path)


def test_faults_after_the_twentieth_are_counted_and_not_kept(tmp_path):
    faults = Faults("a.lst")
    for line in range(100_000):
        faults.add(line, "x")
    assert len(faults.found.lines) == 20
    with pytest.raises(ValueError, match=r"a\.lst:19: x\nand 99980 more$"):
        faults.finish([])
    lines = [f"u{number}|Hi.|no-{number}.wav" for number in range(30)]
    suite = read_suite("seed", write(tmp_path / "meta.lst", *lines))
    with pytest.raises(ValueError, match=r"there is no recording .*\nand 10 more$") as caught:
        suite.write_voices(tmp_path / "voices.jsonl")
    assert str(caught.value).count("\n") == 20


@pytest.fixture
def cv3(tmp_path):
    root = tmp_path / "CV3-Eval"
    write_wav(root / "data/zero_shot/ja/waveform/v.wav", [0.1] * 100, 16000)
    for folder in (root / "data/zero_shot/ja", root / "data/cross_lingual_zeroshot/to_hard_zh"):
        write(folder / "text", "u1 こんにちは 世界", "u2 さようなら")
        write(folder / "prompt_text", "u1 はい", "u2 はい")
        write(folder / "prompt_wav.scp", *[f"{one} data/zero_shot/ja/waveform/v.wav" for one in ("u1", "u2")])
    return root


def test_cv3_folders(cv3):
    suite = read_suite("cv3", cv3 / "data/zero_shot/ja")
    assert (suite.protocol, suite.languages) == ("cv3", ["ja"])
    assert [one.sentence.text for one in suite.items] == ["こんにちは 世界", "さようなら"]
    assert suite.items[0].prompt_audio == cv3 / "data/zero_shot/ja/waveform/v.wav"
    assert [(one.sentence.speaker, one.prompt_text) for one in suite.items] == [("v", "はい")] * 2
    across = read_suite("cv3", cv3 / "data/cross_lingual_zeroshot/to_hard_zh")
    assert (across.languages, across.items[0].prompt_text) == (["zh"], "")


def test_cv3_faults(cv3, tmp_path):
    folder = cv3 / "data/zero_shot/ja"
    write(folder / "text", "u1 a", "u3", "u4 b")
    with pytest.raises(ValueError, match=r"text:3: prompt_text has no line for 'u4'"):
        read_suite("cv3", folder)
    write(folder / "prompt_text", "u1 a", "u4 b")
    write(folder / "prompt_wav.scp", "u1 a.wav", "u4 a.wav")
    with pytest.raises(ValueError, match=r"text:2: expected a name and a value, got 'u3'"):
        read_suite("cv3", folder)
    with pytest.raises(ValueError, match=r"no file text; such folders in it: .*zero_shot/ja"):
        read_suite("cv3", cv3)
    with pytest.raises(ValueError, match="does not say which language"):
        read_suite("cv3", write(tmp_path / "set" / "text", "u a").parent)
    assert read_suite("cv3", tmp_path / "set", "de").languages == ["de"]


def test_jkyb_files(tmp_path):
    path = write(tmp_path / "common_kanji_source.jsonl", json.dumps(ROW, ensure_ascii=False))
    suite = read_suite("jkyb", path)
    (item,) = suite.items
    assert (suite.protocol, item.id, suite.languages) == ("jkyb", "憧_ショウ_1", ["ja"])
    assert item.reference.spoken == "ツヨイショウケイガミラレル。"
    assert (item.reference.tagged, item.reference.natural) == (ROW["tagged_yomi"], ("ショウ", "ドウ"))
    assert item.sentence.text[item.sentence.spans[0].start : item.sentence.spans[0].end] == "憧"
    assert item.sentence.transcripts["ドウ"] == "ツヨイドウケイガミラレル。"
    assert item.sentence.right == ("ショウ", "ドウ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"yomi": ""}, "yomi must be text that is not empty"),
        ({"readings": []}, "readings must hold natural and marginal"),
        ({"readings": {"natural": []}}, r"readings.natural must not be empty"),
        ({"readings": {"natural": [1]}}, r"readings.natural must be a list of readings"),
        ({"readings": {"natural": ["ア"], "marginal": ["ア"]}}, "reading 'ア' is both natural and marginal"),
        ({"tagged_text": "憧憬"}, "tagged_text: expected one word between < and >"),
        ({"tagged_yomi": "<ア>"}, "tagged_yomi without its tags is not yomi"),
    ],
)
def test_jkyb_faults(tmp_path, change, said):
    path = write(tmp_path / "a.jsonl", json.dumps(ROW), json.dumps(ROW | {"key": "b"} | change))
    with pytest.raises(ValueError, match=rf"a.jsonl:2: {said}"):
        read_suite("jkyb", path)


def test_sentences_and_manifests(tmp_path):
    suite = read_suite("sentences", write(tmp_path / "some.txt", "One.", "", "Two."), "en")
    assert [(one.id, one.sentence.language) for one in suite.items] == [("line-1", "en"), ("line-3", "en")]
    row = {"id": "s", "text": "辛い", "language": "ja", "transcripts": {"からい": "からい"}, "right": ["からい"]}
    row["spans"] = [{"start": 0, "end": 1, "right": ["からい"]}]
    (item,) = read_suite("sentences", write(tmp_path / "some.jsonl", json.dumps(row))).items
    assert (item.reference.spoken, item.reference.text) == ("からい", "辛い")
    with pytest.raises(ValueError, match=r"bad.jsonl:1: text is empty"):
        read_suite("sentences", write(tmp_path / "bad.jsonl", '{"id": "a", "text": " "}'))
    write_wav(tmp_path / "p.wav", [0.1] * 400, 16000)
    row = {"id": "m", "text": "Hello.", "audio": "a.wav", "prompt_text": "Hi.", "prompt_audio": "p.wav"}
    (item,) = read_suite("manifest", write(tmp_path / "rows.jsonl", json.dumps(row)), "en").items
    assert (item.sentence.speaker, item.prompt_text, item.reference.language) == ("p", "Hi.", "en")
    assert (item.prompt_audio, item.truth_audio) == (tmp_path / "p.wav", tmp_path / "a.wav")


def test_voices_are_written_for_the_models_that_speak(tmp_path):
    write_wav(tmp_path / "v.wav", [0.1] * 100, 16000)
    suite = read_suite("seed", write(tmp_path / "meta.lst", "a|Hi.|v.wav|One.", "b|Hi.|v.wav|Two.", "c|Three."), "en")
    path = suite.write_voices(tmp_path / "test" / "voices.jsonl")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"speaker": "v", "audio": str(tmp_path / "v.wav"), "text": "Hi."}
    ]
    before = path.stat().st_mtime_ns
    assert suite.write_voices(path).stat().st_mtime_ns == before
    fewer = read_suite("seed", write(tmp_path / "meta.lst", "a|Hello.|v.wav|One."), "en")
    for step in range(4):
        with suppress(Killed), killed_at(step):
            fewer.write_voices(path)
        assert all(files._SCRATCH.fullmatch(one.name) for one in path.parent.iterdir() if one != path)
    assert json.loads(fewer.write_voices(path).read_text())["text"] == "Hello."
    missing = read_suite("seed", write(tmp_path / "other.lst", "a|Hi.|gone.wav|One."), "en")
    with pytest.raises(ValueError, match=r"other.lst:1: there is no recording .*gone.wav"):
        missing.write_voices(tmp_path / "voices.jsonl")


def test_test_sets_by_name(tmp_path):
    with pytest.raises(
        ValueError, match=rf"unknown test set 'sead': expected one of {', '.join(SUITES)}; did you mean"
    ):
        read_suite("sead", tmp_path)

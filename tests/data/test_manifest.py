# SPDX-License-Identifier: Apache-2.0
"""Manifests come back as they were written, and every fault in one is named at once."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from pyarrow import parquet

from tts_align.data.manifest import read_manifest, to_dict, write_manifest
from tts_align.data.records import ManifestError, Pair, Row, Sound, Span

words = st.text(min_size=1, max_size=8).filter(str.strip)
speech_tokens = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5).map(tuple)
paths = st.sampled_from(["a.wav", "deep/b.wav"])
sound = st.one_of(st.tuples(speech_tokens), st.tuples(speech_tokens, paths), st.tuples(st.just(()), paths))
finite = st.floats(allow_nan=False, allow_infinity=False)
raw = st.fixed_dictionaries(
    {"text": words, "language": st.sampled_from(["", "ja", "en-US", "zh-Hant"]), "speaker": st.text(max_size=3)},
    optional={
        "scores": st.dictionaries(words, finite, max_size=2),
        "notes": st.dictionaries(words, words, max_size=2),
        "instruct": words,
        "speaker_vector": st.lists(finite, min_size=1, max_size=3).map(tuple),
        "attributes": st.dictionaries(words, st.one_of(words, finite), max_size=3),
        "prompt": st.tuples(words, st.one_of(st.tuples(speech_tokens), st.tuples(speech_tokens, paths))),
    },
)
contents = st.tuples(raw, sound, sound, st.sampled_from(["pair", None, True, False]), st.booleans())


def build(number: int, raw: dict[str, Any], one: tuple, other: tuple, kind: str | bool | None, marked: bool) -> Row:
    """A row of what was drawn; not within the drawing, where the shape checker's own dice are not welcome."""
    text, (speech, *audio) = raw.get("prompt", ("", [()]))
    prompt = {"prompt_text": text, "prompt_speech": speech, "prompt_audio": "".join(audio)}
    row = Row(id=str(number), **{name: value for name, value in raw.items() if name != "prompt"}, **prompt)
    if marked:
        end = len(row.text)
        row = replace(row, spans=(Span(0, end, ("カ",), ("ツ", "ラ")), Span(end - 1, end)))
    pair = Pair(Sound(*one), Sound(*other))
    shared = pair.chosen.audio == pair.rejected.audio != "" and not (pair.chosen.speech and pair.rejected.speech)
    if kind == "pair" and pair.chosen.speech != pair.rejected.speech and not shared:
        return replace(row, pair=pair)
    return replace(row, speech=pair.chosen.speech, audio=pair.chosen.audio, desirable=None if kind == "pair" else kind)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(drawn=st.lists(contents, min_size=1, max_size=3))
def test_what_is_written_is_read(drawn: list[Any], suffix: str, tmp_path: Path):
    rows = [build(number, *content) for number, content in enumerate(drawn)]
    path = write_manifest(rows, tmp_path / f"rows.{suffix}")
    assert read_manifest(path, check_audio=False).rows == tuple(rows)
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def lines(path: Path, *rows: Any) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


GOOD = {"text": "辛い", "speech": [1, 2]}
FAULTS = [
    ("{text:", "not JSON: Expecting property name"),
    ([1], "expected an object with columns, got list"),
    (
        {"text": "a", "speech": [1], "scores": {"reward": 10**400}},
        "scores: expected finite numbers, but reward is 1",
    ),
    (
        {"text": "a", "speech": [1], "attributes": {"mos": -(10**400)}},
        "attributes: expected finite numbers, but mos",
    ),
    ({"text": "a", "speech": [1], "speaker_vector": [10**400]}, "speaker_vector: expected finite numbers, got others"),
    ({"text": "a", "speech": [1], "language": "klingon"}, "language: expected a code such as ja, en-US or zh-Hant"),
    ({"speech": [1]}, "text is missing"),
    ({"text": " ", "speech": [1]}, "text: expected words, got ' '"),
    ({"text": "a", "prompt": "a", "speech": [1]}, "text and prompt mean the same"),
    ({"text": "a"}, "no utterance: expected speech (speech tokens), audio (a path) or a pair"),
    ({"text": "a", "speech": []}, "speech: is empty"),
    ({"text": "a", "speech": 3}, "speech: expected a list of speech tokens, a path"),
    ({"text": "a", "speech": [1, 2.0]}, "speech: expected whole numbers, got 2.0"),
    ({"text": "a", "speech": [True]}, "speech: expected whole numbers, got True"),
    ({"text": "a", "speech": [3, -1]}, "speech tokens must lie in 0..9, got -1..3"),
    ({"text": "a", "speech": [10]}, "speech tokens must lie in 0..9, got 10..10: were they made by another tokenizer?"),
    ({"text": "a", "audio": "none.wav"}, "speech: there is no recording"),
    ({"text": "a", "audio": "broken.wav"}, "speech: cannot read the recording"),
    ({"text": "a", "speech": [1], "label": "fine"}, "label: expected true or false, 1 or 0, up or down"),
    ({"text": "a", "speech": [1], "label": [1]}, "label: expected true"),
    ({"text": "a", "pair": {"chosen": [1], "rejected": [1]}}, "chosen and rejected are the same"),
    ({"text": "a", "chosen": [1]}, "pair: expected chosen and rejected"),
    ({"text": "a", "pair": {"chosen": [1], "rejected": [2]}, "label": 1}, "a pair takes no label"),
    ({"text": "a", "speech": [1], "chosen": [1], "rejected": [2]}, "either one utterance (speech, audio) or a pair"),
    ({**GOOD, "spans": [{"start": 1, "end": 3}]}, "spans: 1..3 lies outside the text, which has 2 characters"),
    ({**GOOD, "spans": [{"start": 0, "end": 1, "right": "ka"}]}, "right and wrong must be lists of readings"),
    ({**GOOD, "spans": [{"start": 0}]}, "spans: expected {start, end, right, wrong}"),
    ('{"text": "a", "speech": [1], "scores": {"cer": NaN}}', "scores: expected finite numbers, but cer is nan"),
    ({**GOOD, "scores": {"cer": "low"}}, "scores: expected a number for each name"),
    ({**GOOD, "notes": [1]}, "notes: expected words for each name"),
    ({**GOOD, "instruct": 3}, "instruct: expected a string, got 3"),
    (
        {**GOOD, "prompt_text": "so"},
        "prompt_text has no speech: expected prompt_speech (speech tokens) or prompt_audio",
    ),
    ({**GOOD, "prompt_speech": [1]}, "prompt_text is missing: expected the transcript"),
    ({**GOOD, "prompt_text": "so", "prompt_speech": [10]}, "prompt: speech tokens must lie in 0..9, got 10..10"),
    ({**GOOD, "prompt_text": "so", "prompt_speech": [1.5]}, "prompt: expected whole numbers, got 1.5"),
    ({**GOOD, "prompt_text": "so", "prompt_speech": [1], "prompt_audio": "none.wav"}, "prompt: there is no recording"),
    (
        {**GOOD, "prompt_text": "so", "prompt_audio": "tone.wav"},
        "prompt_audio has no speech tokens: make prompt_speech of it",
    ),
    ({**GOOD, "speaker_vector": 1.5}, "speaker_vector: expected a list of numbers, got 1.5"),
    ({**GOOD, "speaker_vector": [1, True]}, "speaker_vector: expected a list of numbers"),
    ('{"text": "a", "speech": [1], "speaker_vector": [NaN]}', "speaker_vector: expected finite numbers"),
    ({**GOOD, "attributes": ["happy"]}, "attributes: expected words or a number for each name"),
    ({**GOOD, "attributes": {"emotion": ["happy"]}}, "attributes: expected words or a number for each name, got"),
    ({**GOOD, "attributes": {"clean": True}}, "attributes: expected words or a number for each name, got True"),
    ('{"text": "a", "speech": [1], "attributes": {"mos": Infinity}}', "attributes: expected finite numbers, but mos"),
    ({**GOOD, "speeker": "a"}, "unknown column 'speeker': did you mean 'speaker'?"),
    ({**GOOD, "id": 1.5}, "id: expected a string, got 1.5"),
    ({**GOOD, "id": "taken"}, "id 'taken' is taken by"),
]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.jsonl", "expected a manifest, but there is no such file"),
        ("s.txt", "expected a .jsonl or .parquet file, .*, got 's.txt'"),
        ("empty", "expected a .jsonl or .parquet file, .*, found none of them in it"),
        ("none.jsonl", "expected at least one row, got none"),
    ],
)
def test_a_fault_of_the_file_itself_speaks_of_no_rows(name: str, message: str, tmp_path: Path):
    (tmp_path / "s.txt").write_text("hello\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.jsonl").touch()
    with pytest.raises(ManifestError) as caught:
        read_manifest(tmp_path / name, codebook_size=10)
    assert re.fullmatch(f"{re.escape(str(tmp_path / name))}: {message}", str(caught.value))


def test_every_fault_is_named_with_its_line(tmp_path: Path):
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    soundfile.write(tmp_path / "tone.wav", np.ones(8), 16000)
    path = lines(tmp_path / "rows.jsonl", {**GOOD, "id": "taken"}, *(row for row, _ in FAULTS))
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, codebook_size=10)
    found = [(fault.where, fault.what) for fault in caught.value.faults]
    assert len(found) == len(FAULTS)
    for number, ((_, expected), (where, what)) in enumerate(zip(FAULTS, found, strict=True), start=2):
        assert where == f"{path}:{number}"
        assert expected in what
    assert f"{len(FAULTS)} faults; mend these rows, or leave them out with on_bad_row: drop" in str(caught.value)
    assert str(caught.value).count("\n") == len(FAULTS)  # all of them: a hundred are shown


def test_bad_rows_can_be_dropped_and_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    soundfile.write(tmp_path / "tone.wav", np.ones(8), 16000)
    path = lines(tmp_path / "rows.jsonl", {**GOOD, "id": "taken", "channel": 3}, *(row for row, _ in FAULTS))
    manifest = read_manifest(path, "drop", codebook_size=10)
    assert [row.id for row in manifest.rows] == ["taken"]
    assert manifest.dropped_rows == len(FAULTS)
    assert len(manifest.dropped) == len(FAULTS)
    assert f"{len(FAULTS)} of {len(FAULTS) + 1} rows are left out" in caplog.text
    assert manifest.ignored == ("channel", "speeker")
    assert "columns that are not known are ignored: channel, speeker" in caplog.text


@pytest.mark.parametrize("rows", [1, 3000])
def test_a_small_parquet_file_of_endless_rows_is_refused(tmp_path: Path, rows: int):
    """Millions of zeros are a kilobyte of a file; among many rows the mean does not give them away."""
    count = 12_000_000 if rows == 1 else 1_000_000
    zeros = pa.ListArray.from_arrays(
        pa.array([0, count, *range(count + 1, count + rows)], pa.int32()), pa.array(np.zeros(count + rows - 1, np.int8))
    )
    table = pa.table({"id": [f"u{row}" for row in range(rows)], "text": ["a"] * rows, "speech": zeros})
    parquet.write_table(table, tmp_path / "rows.parquet", compression="zstd")
    del zeros, table
    assert (tmp_path / "rows.parquet").stat().st_size < 2**16
    before = pa.total_allocated_bytes()
    if rows == 1:
        with pytest.raises(ManifestError, match="holds 12,000,000 values for each row in a column, more than 262,144"):
            read_manifest(tmp_path / "rows.parquet")
        assert pa.total_allocated_bytes() - before < 2**20
    else:
        with pytest.raises(ManifestError, match="row 1: holds 1,000,000 values in a column, more than 262,144"):
            read_manifest(tmp_path / "rows.parquet")
        assert len(read_manifest(tmp_path / "rows.parquet", "drop").rows) == rows - 1


def test_parquet_faults_name_the_row_and_a_directory_is_read_whole(tmp_path: Path):
    write_manifest([Row("a", "one", speech=(1,)), Row("b", "two", speech=(1, 99))], tmp_path / "0.parquet")
    write_manifest([Row("c", "three", speech=(2,))], tmp_path / "1.parquet")
    assert [row.id for row in read_manifest(tmp_path).rows] == ["a", "b", "c"]
    with pytest.raises(ManifestError, match=r"0\.parquet:row 2: speech: speech tokens must lie in 0\.\.9"):
        read_manifest(tmp_path, codebook_size=10)
    (tmp_path / "2.parquet").write_bytes(b"nothing")
    with pytest.raises(ManifestError, match=r"2\.parquet: not a Parquet file"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("label", [True, 1, "desirable"])
def test_columns_of_trl(label: Any, tmp_path: Path):
    rows = [
        {"prompt": "one", "completion": [1, 2], "label": label},
        {"prompt": "two", "chosen": [1], "rejected": [2]},
    ]
    first, second = read_manifest(lines(tmp_path / "rows.jsonl", *rows)).rows
    assert first == Row("row-1", "one", speech=(1, 2), desirable=True)
    assert second == Row("row-2", "two", pair=Pair(Sound((1,)), Sound((2,))))


def test_recordings_are_found_beside_the_manifest(tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", np.zeros(8), 16000)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    manifest = read_manifest(lines(tmp_path / "rows.jsonl", {"text": "one", "audio": "a.wav"}))
    assert manifest.find(manifest.rows[0].audio) == tmp_path / "a.wav"
    with pytest.raises(ManifestError, match="is empty"):
        read_manifest(lines(tmp_path / "rows.jsonl", {"text": "one", "audio": "empty.wav"}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jsonl", "there is no such file"),
        ("rows.txt", "expected a .jsonl or .parquet"),
        ("", "found none of them"),
    ],
)
def test_what_is_no_manifest_is_refused(name: str, message: str, tmp_path: Path):
    (tmp_path / "rows.txt").touch()
    with pytest.raises(ManifestError, match=message):
        read_manifest(tmp_path / name)


def test_an_empty_manifest_is_refused(tmp_path: Path):
    with pytest.raises(ManifestError, match="at least one row"):
        read_manifest(lines(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_failed_write_leaves_the_old_file(suffix: str, tmp_path: Path):
    path = write_manifest([Row("a", "one", speech=(1,))], tmp_path / f"rows.{suffix}")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"Out of range|finite scores, attributes and vectors"):
        write_manifest([Row("a", "one", speech=(1,), scores={"cer": math.nan})], path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_attributes_keep_words_and_numbers_apart(suffix: str, tmp_path: Path):
    row = Row("a", "one", speech=(1,), attributes={"emotion": "happy", "mos": 4, "zip": "4"})
    (read,) = read_manifest(write_manifest([row], tmp_path / f"rows.{suffix}")).rows
    assert read.attributes == {"emotion": "happy", "mos": 4.0, "zip": "4"}
    assert [type(value) for value in read.attributes.values()] == [str, float, str]


def test_what_stands_before_the_words_makes_another_sentence_and_what_is_known_of_them_does_not():
    row = Row("a", "one", "en", "ann", speech=(1,))
    assert replace(row, attributes={"mos": 1.0}, speaker_vector=(0.5,), transcript="wan").sentence == row.sentence
    for change in ({"instruct": "fast"}, {"prompt_text": "so"}, {"prompt_speech": (3,)}):
        assert replace(row, **change).sentence != row.sentence  # a pair of them would compare contexts


def test_what_only_prepare_can_use_is_read_for_it(tmp_path: Path):
    path = lines(tmp_path / "rows.jsonl", {**GOOD, "prompt_text": "so", "prompt_audio": "so.wav"})
    (row,) = read_manifest(path, check_audio=False, unprepared=True).rows
    assert (row.prompt_text, row.prompt_speech, row.prompt_audio) == ("so", (), "so.wav")


def test_columns_that_others_write_empty_count_as_absent(tmp_path: Path):
    columns = {"instruct": None, "prompt_speech": [], "prompt_text": "", "speaker_vector": [], "attributes": None}
    (row,) = read_manifest(lines(tmp_path / "rows.jsonl", {**GOOD, **columns})).rows
    assert row == Row("row-1", "辛い", speech=(1, 2))


def test_one_line_as_a_person_reads_it():
    row = Row("a", "辛い", speech=(1, 2), desirable=False, spans=(Span(0, 2, ("カライ",), ("ツライ",)),))
    assert to_dict(row) == {
        "id": "a",
        "text": "辛い",
        "speech": [1, 2],
        "spans": [{"start": 0, "end": 2, "right": ["カライ"], "wrong": ["ツライ"]}],
        "label": False,
    }

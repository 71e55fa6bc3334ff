# SPDX-License-Identifier: Apache-2.0
"""CosyVoice's Parquet shards serve as manifests, and their recordings are not touched for it."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from sources import save_shard, shard_rows, sound_file

from tts_align.batch import Reads, RowsWanted
from tts_align.data.cosyvoice import NoRecording, is_place, read_recordings
from tts_align.data.datamodule import AlignData
from tts_align.data.manifest import read_manifest, write_manifest
from tts_align.data.records import ManifestError, Pair, Row, Sound
from tts_align.data.select import select
from tts_align.models.base.policy import CodecLM


def tokens(number: int) -> list[int]:
    return [number, number + 1, 7]


def rejected(number: int) -> list[int] | None:
    return None if number % 3 == 2 else [number, 9]


def test_columns_become_ours(tmp_path: Path):
    rows = shard_rows(3, speech_token=tokens, reject_speech_token=rejected, instruct="be kind<|endofprompt|>")
    rows[0] |= {"utt_embedding": [3.0, -4.5], "spk_embedding": [1.0, 1.0]}
    rows[1] |= {"spk_embedding": [2.0, 1.0]}
    read = read_manifest(save_shard(tmp_path / "shard.parquet", rows), codebook_size=50)
    kind = "be kind<|endofprompt|>"
    assert read.rows == (
        Row("u0", "say 0", speaker="a", pair=pair(0), instruct=kind, speaker_vector=(3.0, -4.5)),
        Row("u1", "say 1", speaker="b", pair=pair(1), instruct=kind, speaker_vector=(2.0, 1.0)),
        Row("u2", "say 2", speaker="a", speech=(2, 3, 7), instruct=kind),
    )
    assert not read.ignored


def pair(number: int) -> Pair:
    return Pair(Sound((number, number + 1, 7)), Sound((number, 9)))


def layouts(folder: Path) -> dict[str, Path]:
    """The same four rows in every way in which shards lie about."""
    rows = shard_rows(4, speech_token=tokens)
    for suffix in ("parquet", "tar"):
        for number in range(2):
            save_shard(folder / suffix / f"parquet_{number:09d}.{suffix}", rows[2 * number : 2 * number + 2])
    names = [f"parquet_{number:09d}.tar" for number in range(2)]
    (folder / "tar/data.list").write_text("".join(f"{name}\n" for name in names))
    (folder / "tar/utt2data.list").write_text("{}")
    (folder / "absolute.list").write_text("\n".join(str(folder / "tar" / name) for name in names))
    (folder / "lists").mkdir()
    (folder / "lists/run.list").write_text("\n".join(f"tar/{name}" for name in names))
    whole = save_shard(folder / "parquet_000000007.tar", rows)
    return {
        "one file": whole,
        "folder of .parquet": folder / "parquet",
        "folder of .tar": folder / "tar",
        "list beside": folder / "tar/data.list",
        "absolute list": folder / "absolute.list",
        "list from where the command runs": folder / "lists/run.list",
    }


def test_shards_are_found_wherever_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name, path in layouts(tmp_path).items():
        assert [row.id for row in read_manifest(path).rows] == ["u0", "u1", "u2", "u3"], name
        assert [row.speech for row in read_manifest(path).rows][3] == (3, 4, 7), name


def test_faults_name_file_and_row(tmp_path: Path):
    rows = shard_rows(5, speech_token=tokens, reject_speech_token=rejected)
    rows[0]["speech_token"] = [50]
    rows[1]["text"] = " "
    rows[2]["speech_token"] = []
    rows[3]["reject_speech_token"] = rows[3]["speech_token"]
    rows[4]["speech_token"] = None
    path = save_shard(tmp_path / "s.parquet", rows)
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, codebook_size=50)
    expected = [
        "chosen: speech tokens must lie in 0..49, got 50..50: were they made by another tokenizer?",
        "text: expected words, got ' '",
        "speech: is empty: expected at least one token",
        "chosen and rejected are the same: there is nothing to prefer",
        "has neither speech_token nor audio_data",
    ]
    assert [str(fault) for fault in caught.value.faults] == [
        f"{path}:row {number}: {what}" for number, what in enumerate(expected, start=1)
    ]
    (tmp_path / "data.list").write_text("s.parquet\ngone.parquet\n")
    read = read_manifest(tmp_path / "data.list", "drop")
    assert f"{tmp_path}/data.list:2: there is no shard {tmp_path}/gone.parquet" in map(str, read.dropped)


def test_a_recording_without_tokens_needs_prepare(tmp_path: Path):
    rows = shard_rows(2, audio_data=sound_file(1), speech_token=lambda number: [1] if number else None)
    path = save_shard(tmp_path / "s.parquet", rows)
    with pytest.raises(ManifestError, match=r"parquet:row 1: has a recording but no speech_token.*tts-align prepare"):
        read_manifest(path)
    read = read_manifest(path, check_audio=False, unprepared=True)
    assert [sound.audio for row in read.rows for sound in row.sounds] == [f"{path}:row 1", f"{path}:row 2"]
    assert [row.speech for row in read.rows] == [(), (1,)]


def test_a_tar_that_is_no_shard_is_named(tmp_path: Path):
    (tmp_path / "parquet_000000000.tar").write_bytes(b"ustar" * 200)
    with pytest.raises(ManifestError, match=r"parquet_000000000\.tar: not a Parquet file"):
        read_manifest(tmp_path)


def test_our_own_parquet_stays_our_own(tmp_path: Path):
    path = write_manifest([Row("a", "one", speech=(1,))], tmp_path / "rows.parquet")
    assert read_manifest(path).rows == (Row("a", "one", speech=(1,)),)


def damage(path: Path, column: str, row_group: int = 0) -> None:
    """Overwrite all that a shard holds in a column."""
    group = parquet.ParquetFile(path).metadata.row_group(row_group)
    chunk = next(one for one in map(group.column, range(group.num_columns)) if one.path_in_schema.startswith(column))
    start = min(offset for offset in (chunk.dictionary_page_offset, chunk.data_page_offset) if offset)
    content = bytearray(path.read_bytes())
    content[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    path.write_bytes(content)


def test_training_does_not_read_recordings(tmp_path: Path):
    """They are overwritten, and nobody notices."""
    rows = shard_rows(40, audio_data=lambda number: sound_file(number, 0.2), speech_token=tokens)
    path = save_shard(tmp_path / "s.parquet", rows)
    damage(path, "audio_data")
    assert len(read_manifest(path).rows) == 40
    with pytest.raises((pa.ArrowException, OSError)):
        parquet.read_table(path)


def test_a_damaged_shard_is_named_and_the_others_are_read(tmp_path: Path):
    for number in range(2):
        save_shard(tmp_path / f"{number}.parquet", shard_rows(2, 2 * number, speech_token=tokens))
    damage(tmp_path / "0.parquet", "speech_token")
    read = read_manifest(tmp_path, "drop")
    assert [row.id for row in read.rows] == ["u2", "u3"]
    assert str(read.dropped[0]).startswith(f"{tmp_path}/0.parquet: cannot be read to its end: ")


def test_damaged_recordings_are_named_and_the_others_are_read(tmp_path: Path):
    path = save_shard(tmp_path / "s.parquet", shard_rows(6, audio_data=lambda number: b"%d" % number), 2)
    damage(path, "audio_data", row_group=1)
    found = dict(read_recordings([f"{path}:row {row}" for row in (1, 3, 4, 5)]))
    assert [found[f"{path}:row {row}"] for row in (1, 5)] == [b"0", b"4"]
    for row in (3, 4):
        assert str(found[f"{path}:row {row}"]).startswith(f"{path}:row {row}: the shard cannot be read here: ")


@pytest.mark.parametrize("row_group_size", [1, 7, 100])
def test_recordings_are_read_in_order(row_group_size: int, tmp_path: Path):
    def content(number: int) -> bytes | None:
        return None if number == 5 else b"%d" % number

    paths = [
        save_shard(tmp_path / f"{name}.parquet", shard_rows(40, first, audio_data=content), row_group_size)
        for name, first in (("one", 0), ("two", 40))
    ]
    wanted = [(0, 0), (0, 5), (0, 6), (0, 39), (1, 17), (1, 18)]
    places = [f"{paths[shard]}:row {row + 1}" for shard, row in wanted]
    assert all(map(is_place, places))
    for place, (shard, row), (name, found) in zip(places, wanted, read_recordings(places), strict=True):
        assert name == place
        expected = content(40 * shard + row)
        assert found == expected if expected else isinstance(found, NoRecording) and found.name == place


@pytest.mark.parametrize("name", ["a.wav", "row 3", "deep/b:row.wav", ""])
def test_a_path_is_no_place_in_a_shard(name: str):
    assert not is_place(name)


@pytest.mark.parametrize(
    ("reads", "count"), [(Reads.SPEECH, 12), (Reads.PAIR, 8), (Reads.LABELLED, 16)], ids=["sft", "dpo", "kto"]
)
def test_training_reads_shards(reads: Reads, count: int, policy: CodecLM, tmp_path: Path):
    """Good speech, pairs and labels: what each objective would see, with and without rejected speech."""
    rows = shard_rows(12, speech_token=tokens, reject_speech_token=rejected, audio_data=b"never heard")
    save_shard(tmp_path / "parquet_000000000.tar", rows[:6])
    save_shard(tmp_path / "parquet_000000001.tar", rows[6:])
    items = select(read_manifest(tmp_path).rows, reads)
    assert len(items) == count
    data = AlignData(str(tmp_path), wants=RowsWanted(reads), rows_per_step=4)
    data.prepare(policy)
    seen = {source.row.id: source for source in data.sources().values()}
    assert set(seen) == ({f"u{i}" for i in range(12) if reads is Reads.SPEECH or rejected(i) is not None})
    given: dict[str, Any] = {row["utt"]: row for row in rows}
    for key, source in data.sources().items():
        column = "speech_token" if source.desirable else "reject_speech_token"
        assert data.rows()[key].speech == tuple(given[source.row.id][column])

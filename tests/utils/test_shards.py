# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from tts_align.utils.shards import Shards, digest, listed_digest


def rows(*names):
    return [{"id": name, "value": name * 2} for name in names]


def test_digest_tells_settings_apart():
    assert digest("a", 1) == digest("a", 1) != digest("a", 2)
    assert digest("ab", "c") != digest("a", "bc")


def test_the_last_process_to_end_writes_the_file(tmp_path):
    out, ids = tmp_path / "out.jsonl", ["a", "b", "c"]
    first, second = Shards(out, "k", ids, 0, 2), Shards(out, "k", ids, 1, 2)
    first.append(rows("c", "a"))
    assert not first.merge()
    second.append(rows("b"))
    assert second.merge()
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ids


def test_with_a_barrier_the_first_process_writes(tmp_path):
    out = tmp_path / "out.jsonl"
    first, second = Shards(out, "k", ["a", "b"], 0, 2), Shards(out, "k", ["a", "b"], 1, 2)
    first.append(rows("a"))
    second.append(rows("b"))
    assert second.merge(lambda: None, rank=1)
    assert not out.exists()
    assert first.merge(lambda: None, rank=0)
    assert out.exists()
    assert not first.folder.exists()


def test_rows_of_other_settings_and_cut_lines_are_not_taken(tmp_path):
    out = tmp_path / "out.jsonl"
    other = Shards(out, "other", ["a"])
    other.append(rows("a"))
    mine = Shards(out, "k", ["a", "b"])
    assert mine.missing == ["a", "b"]
    mine.append(rows("a"))
    with mine.shard.open("a") as file:
        file.write('{"id": "b", "made_wi')
    again = Shards(out, "k", ["a", "b"])
    assert again.missing == ["b"]
    again.append(rows("b"))
    assert again.merge()
    assert len(out.read_text().splitlines()) == 2


def test_rows_stay_in_their_files_and_can_be_read_when_these_are_gone(tmp_path):
    """Of the final file, of shards of earlier processes, and of this one's, replaced and removed by the merge."""
    out, ids = tmp_path / "out.jsonl", [f"é{number}" for number in range(40)]
    Shards(out, "k", ids, 1, 3).append(rows(*ids[:13]))
    mine = Shards(out, "k", ids, 0, 3)
    mine.append(rows(*ids[13:20]))
    Shards(out, "k", ids, 2, 3).append(rows(*ids[20:]))
    assert mine.missing == ids[20:]
    assert mine.merge(lambda: None)
    assert not mine.folder.exists()
    assert {name: row["value"] for name, row in mine.rows.items()} == {name: name * 2 for name in ids}
    whole = Shards(out, "k", ids)
    out.unlink()
    assert [row["value"] for row in whole.rows.values()] == [name * 2 for name in ids]
    assert "other" not in whole.rows


def test_a_row_that_takes_the_place_of_half_a_line_is_read_anew(tmp_path):
    """What was read before the half line was dropped must not be taken for the new row."""
    out, ids = tmp_path / "out.jsonl", ["a", "b", "c"]
    killed = Shards(out, "k", ids)
    killed.append(rows("a", "b"))
    killed.shard.write_bytes(b"\xef\xbb\xbf" + killed.shard.read_bytes()[:-8])
    resumed = Shards(out, "k", ids)
    assert resumed.rows["a"]["value"] == "aa"
    resumed.append(rows("c", "b"))
    assert {name: row["value"] for name, row in resumed.rows.items()} == {"a": "aa", "b": "bb", "c": "cc"}


def test_a_list_of_settings_has_the_same_digest_one_by_one():
    settings = [("a", (1, 2)), ("b", ())]
    assert listed_digest("judge", {"x": 1}, rows=iter(settings)) == digest("judge", {"x": 1}, settings)
    assert listed_digest("judge", rows=iter(())) == digest("judge", [])


def test_names_must_be_unique(tmp_path):
    with pytest.raises(ValueError, match="'a' would appear twice"):
        Shards(tmp_path / "out.jsonl", "k", ["a", "a"])


def test_rows_that_another_process_has_written_elsewhere_are_missed(tmp_path):
    """Working directories of their own: the first process cannot see the other's shard, and says so at the end."""
    first = Shards(tmp_path / "here" / "out.jsonl", "k", ["a", "b"], 0, 2)
    second = Shards(tmp_path / "there" / "out.jsonl", "k", ["a", "b"], 1, 2)
    first.append(rows("a"))
    second.append(rows("b"))
    waited = []
    assert not second.merge(lambda: waited.append(1), rank=1)
    with pytest.raises(ValueError, match=r"out.jsonl is not complete: 1 of 2 rows are missing, b first.*absolute path"):
        first.merge(lambda: waited.append(0), rank=0)
    assert sorted(waited) == [0, 0, 1, 1]
    assert first.folder.exists()


def test_a_process_alone_must_have_made_every_row(tmp_path):
    alone = Shards(tmp_path / "out.jsonl", "k", ["a", "b"])
    alone.append(rows("a"))
    with pytest.raises(ValueError, match="1 of 2 rows are missing, b first"):
        alone.merge()


def test_what_failed_once_and_worked_since_is_taken_as_worked(tmp_path):
    """Whichever process did which: the number of processes may have changed between."""
    out = tmp_path / "out.jsonl"
    failed = Shards(out, "k", ["a"], 1, 2)
    failed.append([{"id": "a", "error": "no sound"}])
    assert failed.rows["a"]["error"]
    Shards(out, "k", ["a"]).append(rows("a"))
    assert "error" not in Shards(out, "k", ["a"]).rows["a"]

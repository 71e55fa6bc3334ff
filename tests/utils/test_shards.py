# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from tts_align.utils.shards import Shards, digest


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


def test_names_must_be_unique(tmp_path):
    with pytest.raises(ValueError, match="'a' would appear twice"):
        Shards(tmp_path / "out.jsonl", "k", ["a", "a"])

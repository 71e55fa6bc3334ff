# SPDX-License-Identifier: Apache-2.0
"""Manifests as stored tables give to the digit what reading them row by row gives; and they are stored only once."""

import gc
import json
import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import by_hand
import fsspec
import numpy as np
import pyarrow as pa
import pytest
import soundfile
from letters import Letters, make_rows
from pyarrow import parquet
from test_datamodule import Recorder, fit, labelled
from test_manifest import FAULTS

from tts_align.batch import Reads, RowsWanted
from tts_align.data.datamodule import AlignData
from tts_align.data.examples import Examples
from tts_align.data.keyed import Keyed
from tts_align.data.manifest import read_manifest, to_dict, write_manifest
from tts_align.data.parse import Rules
from tts_align.data.records import Fault, Faults, ManifestError, Pair, Row, Sound
from tts_align.data.refused import Refused
from tts_align.data.select import Selector, select
from tts_align.data.table import build, read, rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
]


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small manifests are stored, too, and batches are so small that there are several."""
    monkeypatch.setattr(read, "STORED_FROM_BYTES", 0)


def various(count: int, seed: int = 0) -> list[Any]:
    """Raw rows of every kind, right ones and wrong ones."""
    draw = np.random.default_rng(seed)

    def tokens() -> list[int]:
        return draw.integers(0, 10, draw.integers(1, 6)).tolist()

    found: list[Any] = []
    for number in range(count):
        raw: dict[str, Any] = {"text": f"say {number % 7}", "speaker": "ab"[number % 2]}
        kind = draw.integers(10)
        if kind < 6:
            raw["speech"] = tokens()
            raw |= {"label": [True, False, "up", 0, None][draw.integers(5)]}
        elif kind == 6:
            raw |= {"chosen": tokens(), "rejected": tokens()}
        elif kind == 7:
            raw["pair"] = {"chosen": {"speech": tokens(), "audio": "never.wav"}, "rejected": tokens()}
        elif kind == 8:
            raw |= {"completion": tokens(), "prompt_text": "so", "prompt_speech": tokens(), "instruct": "slowly"}
        else:
            found.append(FAULTS[draw.integers(1, len(FAULTS))][0])
            continue
        if draw.random() < 0.3:
            raw |= {"id": [f"n{number}", number, "taken"][draw.integers(3)], "strange": 1}
        if draw.random() < 0.2:
            raw |= {"scores": {"cer": float(draw.random())}, "notes": {"heard": "x"}, "attributes": {"mos": 3}}
            raw |= {"spans": [{"start": 0, "end": 2, "right": ["カ"]}], "speaker_vector": [0.1, 2]}
        found.append(raw)
    return [json.loads(one) if isinstance(one, str) else one for one in found]


def as_lines(path: Path, raws: list[Any]) -> Path:
    path.write_text("".join(json.dumps(raw) + "\n" for raw in raws), "utf-8")
    return path


@pytest.mark.parametrize("seed", range(3))
def test_rows_and_faults_are_those_of_one_by_one(tmp_path: Path, seed: int):
    path = as_lines(tmp_path / "rows.jsonl", various(400, seed))
    rules = Rules(10, lambda name: f"no {name}", needed_audio_only=True)
    expected, faults, ignored, starred = by_hand.read(by_hand.lines(path), rules)
    table, found = read.table_of(path, rules, ())
    assert table == expected
    assert list(map(str, found.faults)) == faults[:100]
    assert found.faults.total == len(faults)
    assert found.bad + len(table) == 400
    assert (found.ignored, found.starred) == (ignored, starred)


def test_parquet_is_checked_as_lines_are(tmp_path: Path):
    """Columns of Parquet, with absent values, other types and repeated names of rows, against their own records."""
    count, draw = 300, np.random.default_rng(1)
    speech = [draw.integers(-1 if i % 29 == 0 else 0, 10, i % 5).tolist() if i % 11 else None for i in range(count)]
    sides = [{"speech": [1, i % 3], "audio": None} if i % 11 == 0 else None for i in range(count)]
    scores, vector = pa.map_(pa.string(), pa.float64()), pa.list_(pa.float32())
    label = [None if i % 11 == 0 else [1.0, 0.0, 4.0][i % 3] for i in range(count)]
    table = pa.table(
        {
            "id": pa.array([i if i % 50 else 7 for i in range(count)]),
            "text": pa.array([" " if i % 31 == 0 else "ab" for i in range(count)]).dictionary_encode(),
            "speech": pa.array(speech, pa.large_list(pa.int16())),
            "pair": pa.array([{"chosen": s, "rejected": {"speech": [2], "audio": None}} if s else None for s in sides]),
            "label": pa.array(label),
            "scores": pa.array([[("cer", 0.5)] if i % 2 else [] for i in range(count)], scores),
            "speaker_vector": pa.array([[0.1, float("nan") if i % 37 == 0 else 1] for i in range(count)], vector),
            "speeker": pa.array(["a" if i % 41 == 0 else None for i in range(count)]),
            "other": pa.array([1.5] * count),
        }
    )  # fmt: skip
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=70)
    path = tmp_path / "rows.parquet"
    raws = [(f"{path}:row {number}", raw) for number, raw in enumerate(parquet.read_table(path).to_pylist(), start=1)]
    expected, faults, ignored, starred = by_hand.read(raws, Rules(10))
    assert starred  # 4.0 is a number of stars
    got, what = read.table_of(path, Rules(10), ())
    assert got == expected
    assert list(map(str, what.faults)) == faults[:100]
    assert (what.faults.total, what.ignored, what.starred) == (len(faults), ignored, starred)
    assert len(expected) > 50 < len(faults)


READS = [(reads, only) for reads in Reads for only in (False, True) if not (reads is Reads.PAIR and only)]


def mixed(count: int, seed: int) -> list[Row]:
    found = make_rows(count, 6, seed)
    for number in range(0, count, 7):
        one, other = Sound(found[number].speech), Sound((number % 50, 3))
        found[number] = Row(f"p{number}", f"say {number % 5}", speaker="a", pair=Pair(one, other))
    return [Row(f"n{i}", "say 1", speech=(i,)) if i % 13 == 0 else row for i, row in enumerate(found)]


@pytest.mark.parametrize(("reads", "paired_only"), READS)
def test_selection_is_that_of_records(reads: Reads, paired_only: bool):
    for seed in range(3):
        given = mixed(80, seed)
        for flip in (False, True) if reads in (Reads.PAIR, Reads.LABELLED) else (False,):
            expected = by_hand.select(given, reads, paired_only, flip, seed)
            assert list(select(given, reads, paired_only, flip, seed)) == expected
        kept = np.arange(0, 80, 3)
        some = Selector(rows.RowTable.of(given).take(kept), seed).select(reads, paired_only)
        assert list(some) == by_hand.select([given[i] for i in kept], reads, paired_only, False, seed)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_token_rows_and_keys_are_those_of_records(share: float, policy: Letters):
    for reads in (Reads.LABELLED, Reads.PAIR):
        items = select(mixed(90, 4), reads, seed=2)
        made = Examples.of(items, policy, True, share, seed=2)
        expected, twins = by_hand.token_rows(list(items), policy, share, 2)
        assert (made.rows, made.mismatched) == (expected, twins)
        assert [key.tobytes().hex() for key in made.keys] == [policy.layout.key(row) for row in expected]
        assert [key.tobytes().hex() for key in made.mismatched_keys] == [policy.layout.key(row) for row in twins]
        assert made.inputs.tolist() == [policy.layout.input_count(row) for row in expected]
        assert made.targets.tolist() == [policy.layout.target_count(row) for row in expected]


def test_rows_by_key_are_those_of_a_dictionary():
    draw = np.random.default_rng(0)
    keys = draw.integers(0, 2, (60, 16)).astype(np.uint8)
    keys[:, :13] = 0  # many are equal
    parts = [(keys[:35], list(range(35))), (keys[35:], list(range(100, 125)))]
    flat = [(key.tobytes().hex(), value) for some, values in parts for key, value in zip(some, values, strict=True)]
    first: dict[str, int] = {}
    for key, value in flat:
        first.setdefault(key, value)
    assert list(Keyed(parts).items()) == list(first.items())
    assert list(Keyed(parts, last=True).items()) == list(dict(flat).items())
    with pytest.raises(KeyError):
        Keyed(parts)["f" * 32]
    for count in (1, 7, 59, 60, 1000):
        chosen = flat[:: max(60 // count, 1)][:count]
        assert Keyed(parts).spread(count) == dict(chosen)


class Named(Letters):
    """Letters whose texts may be stored."""

    text_identity = "letters"


def batches(path: str, folder: Path | None, **knobs: Any) -> list[Any]:
    data = AlignData(path, wants=RowsWanted(Reads.LABELLED, mismatched=True), rows_per_step=6, seed=3, **knobs)
    data.folder = folder
    data.prepare(Named())
    split = data._splits["train"]
    return [list(split.examples.rows), list(data.rows()), [one.tolist() for one in split.plan.steps(1)], split.digest]


def test_what_is_stored_is_read_once_and_is_the_same(
    tmp_path: Path, stored: None, monkeypatch: pytest.MonkeyPatch, manifest: Any
):
    path = manifest(60)
    in_memory = batches(path, None)
    assert batches(path, tmp_path / "store") == in_memory
    kept = sorted(one.name for one in (tmp_path / "store").iterdir())
    assert [name.partition("-")[0] for name in kept] == ["content", "examples", "rows", "rows", "texts"]
    with monkeypatch.context() as patch:
        patch.setattr(build.Builder, "build", lambda *_: pytest.fail("read again"))
        patch.setattr(Named, "encode_text", counted := Counted())
        assert batches(path, tmp_path / "store") == in_memory
        assert counted.calls <= 5  # a few rows are made anew, and compared
        flipped = batches(path, tmp_path / "store", flip_labels=True)
        assert flipped[0] == in_memory[0]
    for name in kept:  # whatever is damaged is made anew
        if not name.startswith("content"):
            place = tmp_path / "store" / name
            place.write_bytes(place.read_bytes()[: place.stat().st_size // 2])
            assert batches(path, tmp_path / "store") == in_memory
    write_manifest(make_rows(60, 8, seed=9), path)  # other rows under the same name
    assert batches(path, tmp_path / "store") == batches(path, None) != in_memory


class Counted:
    """Counts how often texts are encoded."""

    def __init__(self) -> None:
        self.calls = 0

    def __get__(self, policy: Any, kind: Any) -> Any:
        def encode(*given: Any) -> Any:
            self.calls += 1
            return Letters.encode_text(policy, *given)

        return encode


@pytest.mark.parametrize("folder", ["store", None])
def test_examples_can_be_sent_to_other_processes(folder: str | None, tmp_path: Path, stored: None, manifest: Any):
    """Which look at the stored files themselves: what is sent is small."""
    data = AlignData(manifest(60), wants=RowsWanted(Reads.LABELLED, mismatched=True), rows_per_step=6, seed=3)
    data.folder = None if folder is None else tmp_path / folder
    data.prepare(Named())
    examples = data._splits["train"].examples
    sent = pickle.loads(pickle.dumps(examples))
    assert sent.rows == examples.rows
    assert sent.mismatched == examples.mismatched
    assert sent.sources == examples.sources


def test_a_policy_that_reads_otherwise_today_is_noticed(tmp_path: Path, stored: None, manifest: Any):
    class Louder(Named):
        def encode_text(self, text: str, *context: Any) -> Any:
            return super().encode_text(text.upper(), *context)

    path = manifest(30)
    batches(path, tmp_path)
    data = AlignData(path, wants=RowsWanted(Reads.LABELLED, mismatched=True), rows_per_step=6, seed=3)
    data.folder = tmp_path
    data.prepare(Louder())
    assert data._splits["train"].examples.rows[0].text[1:4] == tuple(map(ord, "SAY"))


def test_shards_by_pattern_and_url_are_those_of_a_folder(tmp_path: Path, stored: None):
    given = make_rows(50, 8)
    for number in range(5):
        write_manifest(given[number * 10 : number * 10 + 10], tmp_path / "in" / f"{number}.parquet")
    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path / "in"), "/bucket/in", recursive=True)
    whole = batches(str(tmp_path / "in"), None)
    places = [f"{tmp_path}/in/*.parquet", f"file://{tmp_path}/in", "memory://bucket/in", "memory://bucket/in/*.parquet"]
    for place in places:
        assert batches(place, tmp_path / "store") == whole
    fs.pipe("/bucket/lines/a.jsonl", b'{"text": "a", "speech": [1]}\n{"text": "b", "speech": [99]}\n')
    with pytest.raises(ManifestError, match=r"memory://(/)?bucket/lines/a\.jsonl:2: speech: speech tokens must lie"):
        read_manifest("memory://bucket/lines", codebook_size=50)
    with pytest.raises(ManifestError, match="found none"):
        read_manifest("memory://bucket/nothing-*.parquet")
    with pytest.raises(ManifestError, match="cannot be opened"):
        read_manifest("nosuch://bucket/rows.parquet")


def test_faults_are_counted_and_the_first_hundred_kept():
    def many() -> Iterator[Fault]:
        for number in range(300_000):
            yield Fault(f"rows.jsonl:{number + 1}", "text is missing")

    error = ManifestError("rows.jsonl", Faults(many()))
    lines = str(error).splitlines()
    assert lines[0].startswith("rows.jsonl: 300000 faults; ")
    assert lines[1] == "  rows.jsonl:1: text is missing"
    assert (len(lines), lines[-1], len(error.faults)) == (102, "  ... and 299900 more", 100)
    late = Faults()
    for number in (5, 3, 4, *range(200, 400), 1):
        late.add(number, str(number), "")
    assert [fault.where for fault in late[:5]] == ["1", "3", "4", "5", "200"]


def test_files_of_other_tools_keep_every_row_of_many(tmp_path: Path):
    """More rows than a chunk, and a fault and a taken id in the last one."""
    given = [to_dict(row) for row in make_rows(2500, 40)]
    given[2490]["speech"], given[2499]["id"] = [], "u17"
    path = as_lines(tmp_path / "rows.jsonl", given)
    found = read_manifest(path, "drop", 50)
    assert len(found.rows) == 2498 == len({row.id for row in found.rows})
    assert [str(fault) for fault in found.dropped] == [
        f"{path}:2491: speech: is empty: expected at least one token",
        f"{path}:2500: id 'u17' is taken by {path}:18",
    ]
    assert found.rows[2300] == read_manifest(path, "drop").rows[2300]


def test_every_refused_row_is_written_down_in_order(tmp_path: Path):
    given = [{"text": "a", "speech": [1] if i % 2 else [], "id": "same" if i % 50 == 1 else f"{i}"} for i in range(400)]
    path, refused = as_lines(tmp_path / "rows.jsonl", given), Refused()
    found = read_manifest(path, "drop", 50, refused=refused)
    lines = [int(one["where"].rpartition(":")[2]) for one in refused]
    assert lines == sorted(set(range(1, 400, 2)) | set(range(52, 400, 50)))
    assert (refused.count, found.dropped_rows, found.dropped.total, len(found.dropped)) == (207, 207, 207, 100)
    assert [one["what"] for one in refused][26] == f"id 'same' is taken by {path}:2"
    refused.close()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_resumes_at_the_exact_row(tmp_path: Path, stored: None):
    """kill -9 in the middle of an epoch over shards: what is trained on afterwards is what would have been."""
    given = make_rows(2400, 100)
    for number in range(6):
        write_manifest(given[number * 400 : number * 400 + 400], tmp_path / "in" / f"{number}.parquet")
    place, save = f"file://{tmp_path}/in/*.parquet", {"every_n_train_steps": 10}
    limits = {"max_epochs": 1, "limit_train_batches": 60}
    whole = fit(Named(), labelled(place, rows_per_step=32, seed=1), folder=tmp_path / "whole", **limits)
    child = os.fork()
    if child == 0:
        step = Recorder.training_step

        def dying(self: Recorder, batch: Any, batch_idx: int) -> Any:
            if len(self.seen) == 47:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, batch, batch_idx)

        Recorder.training_step = dying  # type: ignore[method-assign]
        try:
            fit(Named(), labelled(place, rows_per_step=32, seed=1), folder=tmp_path / "cut", save=save, **limits)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    saved = tmp_path / "cut" / "checkpoints" / "step=40.ckpt"
    resumed = fit(Named(), labelled(place, rows_per_step=32, seed=1), ckpt=saved, folder=tmp_path / "cut", **limits)
    assert resumed.seen == whole.seen[40:]


def test_a_small_manifest_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The fits of a pair read the same one; what a caller does with the faults stays its own."""
    path, made = tmp_path / "rows.jsonl", []
    build_again = read._in_memory
    monkeypatch.setattr(read, "_in_memory", lambda *given: made.append(given) or build_again(*given))
    rows = [{"text": f"number {number}", "speech": [1, 2]} for number in range(3)] + [{"text": "no speech"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read_manifest(path, "drop")
    read_manifest(path, "drop")
    assert len(made) == 2, "it was written a moment ago: another change could have the same time"
    os.utime(path, (1_000_000_000, 1_000_000_000))
    first = read_manifest(path, "drop")
    first.dropped.total = 7  # type: ignore[attr-defined]  # of the Faults
    again = read_manifest(path, "drop")
    assert len(made) == 3
    assert (again.dropped.total, again.dropped_rows, len(again.rows)) == (1, 1, 3)  # type: ignore[attr-defined]
    read_manifest(path, "drop", codebook_size=100)
    assert len(made) == 4, "checked by another rule"
    path.write_text(path.read_text() + json.dumps(rows[0] | {"id": "one more"}) + "\n")
    os.utime(path, (1_000_000_001, 1_000_000_001))
    assert len(read_manifest(path, "drop").rows) == 4
    for number in range(2 * read._READ_KEPT):
        (other := tmp_path / f"{number}.jsonl").write_text(path.read_text())
        os.utime(other, (1_000_000_000, 1_000_000_000))
        read_manifest(other, "drop")
    assert len(read._READ) == read._READ_KEPT


def test_a_manifest_with_recordings_is_looked_at_every_time(tmp_path: Path):
    """They may be gone although the manifest has not changed."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a", "audio": "a.wav", "speech": [1]}) + "\n")
    os.utime(path, (1_000_000_000, 1_000_000_000))
    soundfile.write(tmp_path / "a.wav", np.zeros(100), 16_000)
    assert len(read_manifest(path).rows) == 1
    (tmp_path / "a.wav").unlink()
    with pytest.raises(ManifestError, match="there is no recording"):
        read_manifest(path)


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="needs Linux: what of a file lies in memory")
def test_what_was_read_once_to_choose_the_rows_is_given_back(tmp_path: Path, stored: None):
    """The first start reads every token to name the rows; what stays is a table of which little has been looked at."""
    count, random = 1_000, np.random.default_rng(0)
    columns = {"id": [f"u{n}" for n in range(count)], "text": [f"say {n % 100}" for n in range(count)]}
    # Large enough that the 2 MB which the system maps around whatever is looked at do not count.
    speech = [random.integers(0, 10, 20_000, np.int32) for _ in range(count)]
    parquet.write_table(pa.table(columns | {"speech": speech}), tmp_path / "rows.parquet")
    table = read_manifest(tmp_path / "rows.parquet", codebook_size=50, folder=tmp_path).rows
    assert isinstance(table, rows.RowTable)
    assert table.file is not None
    sum(int(table.lists("speech")[row].sum()) for row in range(count))
    looked_at = resident(table.file)
    again = table.reopened()
    assert again == table
    again = table.reopened()
    del table
    gc.collect()
    assert again.file is not None
    assert resident(again.file) < 0.3 * looked_at
    data = AlignData(str(tmp_path / "rows.parquet"), wants=RowsWanted(Reads.ANY), rows_per_step=4)
    data.folder, opened = tmp_path, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows.RowTable, "reopened", lambda self: opened.append(self) or self)
        patch.setattr(Letters, "text_identity", "letters")
        data.prepare(Letters())
    assert len(opened) == 1


def resident(file: Path) -> int:
    """Bytes of a file that this process has in memory."""
    found, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.partition(" ")[0]:
            ours = line.endswith(str(file))
        elif ours and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found

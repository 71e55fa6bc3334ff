# SPDX-License-Identifier: Apache-2.0
"""From recordings to a manifest: whatever the source, wherever it was killed, however many processes there were."""

import errno
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import soundfile
import torch
from killed import Killed, killed_at
from places import ROOT
from processes import in_two_processes
from sources import save_kaldi, save_shard, save_sounds, shard_rows, sound, sound_file

from tts_align.cli import entry as cli
from tts_align.cli import prepare as command
from tts_align.data import prepared
from tts_align.data.manifest import read_manifest
from tts_align.data.prepared import Target
from tts_align.data.recording_encoder import RecordingEncoder
from tts_align.data.recordings import Limits
from tts_align.data.records import Manifest, ManifestError, Row
from tts_align.models.cosyvoice.features import kaldi_fbank, whisper_mel
from tts_align.models.cosyvoice.frontend import CosyVoiceTokenizer

pytestmark = [pytest.mark.whole_runs, pytest.mark.filterwarnings("ignore:.*does not have many workers.*")]
Directory = Callable[..., str]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Directory:
    """Directories of the two CosyVoice models that hold nothing but tiny encoders, by the name of the family."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tests/models/cosyvoice"))
        from onnx_models import save_directory
    made: dict[str, str] = {}

    def directory(family: str = "cosyvoice2") -> str:
        if family not in made:
            made[family] = str(save_directory(tmp_path_factory.mktemp("encoders") / family, family))
        return made[family]

    return directory


def prepare(directory: str, source: Path, out: Path, *options: str) -> Manifest:
    """The command, as the command line calls it, and what it has written."""
    args = ["--directory", directory, "--source", str(source), "--out", str(out), "--trainer.accelerator", "cpu"]
    cli.prepare([*args, "--trainer.devices", "1", *options])
    return read_manifest(out)


def lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def recorded(folder: Path, count: int) -> Path:
    """A JSONL manifest of recordings."""
    names = save_sounds(folder / "sounds", count)
    return lines(
        folder / "rows.jsonl",
        [{"id": f"u{i}", "text": f"say {i}", "audio": f"sounds/{name}"} for i, name in enumerate(names)],
    )


def copied(directory: str, to: Path) -> str:
    return str(shutil.copytree(directory, to))


def run_alone(path: str, *inputs: np.ndarray) -> np.ndarray:
    """An ONNX file on one input, without any of our code around it."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {slot.name: value for slot, value in zip(session.get_inputs(), inputs, strict=True)})[0]


def codes_of(directory: str, path: Path) -> tuple[int, ...]:
    mel = whisper_mel(torch.from_numpy(soundfile.read(path, dtype="float32")[0]))
    version = 2 if "cosyvoice2" in directory else 3
    lengths = np.array([mel.shape[-1]], np.int32)
    speech_tokens = run_alone(f"{directory}/speech_tokenizer_v{version}.batch.onnx", mel[None].numpy(), lengths)
    return tuple(speech_tokens[0, : mel.shape[-1] // 4].tolist())


def vector_of(directory: str, path: Path) -> tuple[float, ...]:
    features = kaldi_fbank(torch.from_numpy(soundfile.read(path, dtype="float32")[0]))
    return tuple(run_alone(f"{directory}/campplus.onnx", features[None].numpy())[0].tolist())


@pytest.mark.parametrize(("family", "suffix"), [("cosyvoice2", "jsonl"), ("cosyvoice3", "parquet")])
def test_recordings_get_codes_and_vectors(family: str, suffix: str, encoders: Directory, tmp_path: Path):
    source = recorded(tmp_path / "in", 5)
    read = prepare(encoders(family), source, tmp_path / f"out.{suffix}")
    assert [row.id for row in read.rows] == [f"u{i}" for i in range(5)]
    for number, row in enumerate(read.rows):
        path = tmp_path / f"in/sounds/{number}.wav"
        assert (row.text, row.speech) == (f"say {number}", codes_of(encoders(family), path))
        assert np.array_equal(np.float32(row.speaker_vector), np.float32(vector_of(encoders(family), path)))
        assert read.find(row.audio).resolve() == path
    assert {path.name for path in tmp_path.iterdir()} == {"in", f"out.{suffix}", f"out.{suffix}.summary.json"}


def test_what_is_known_is_kept(encoders: Directory, tmp_path: Path):
    """Labels, attributes, speech tokens and vectors of the source stay; only what is missing is made."""
    names = save_sounds(tmp_path, 4)
    rows = [
        {"id": "a", "text": "one", "audio": names[0], "label": False, "attributes": {"mos": 2.5}, "instruct": "fast"},
        {"id": "b", "text": "one", "audio": names[1], "speech": [1, 2], "speaker_vector": [0.25]},
        {"id": "c", "text": "one", "speech": [3]},
        {"id": "d", "text": "two", "audio": names[2], "prompt_audio": names[3], "prompt_text": "so"},
    ]
    a, b, c, d = prepare(encoders(), lines(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl").rows
    assert (a.desirable, a.attributes, a.instruct) == (False, {"mos": 2.5}, "fast")
    assert b == Row("b", "one", speech=(1, 2), audio=names[1], speaker_vector=(0.25,))
    assert c == Row("c", "one", speech=(3,))
    assert (d.prompt_text, d.prompt_audio) == ("so", names[3])
    assert d.prompt_speech == codes_of(encoders(), tmp_path / names[3])
    assert d.speech == codes_of(encoders(), tmp_path / names[2])


def test_both_sides_of_a_pair_are_heard(encoders: Directory, tmp_path: Path):
    names = save_sounds(tmp_path, 3)
    rows = [
        {"id": "a", "text": "one", "chosen": names[0], "rejected": names[1]},
        {"id": "b", "text": "two", "pair": {"chosen": names[2], "rejected": [5, 6]}},
    ]
    a, b = prepare(encoders(), lines(tmp_path / "rows.jsonl", rows), tmp_path / "out.parquet").rows
    assert [side.speech for side in a.sounds] == [codes_of(encoders(), tmp_path / name) for name in names[:2]]
    assert [side.speech for side in b.sounds] == [codes_of(encoders(), tmp_path / names[2]), (5, 6)]
    assert np.allclose(a.speaker_vector, vector_of(encoders(), tmp_path / names[0]), rtol=1e-6)


def test_vectors_can_be_left_out(encoders: Directory, tmp_path: Path):
    read = prepare(encoders(), recorded(tmp_path, 2), tmp_path / "out.jsonl", "--speaker_vectors", "false")
    assert all(row.speech and not row.speaker_vector for row in read.rows)


def test_a_kaldi_folder(encoders: Directory, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = save_kaldi(tmp_path / "train", 5)
    torch.save({"u0": [1, 2]}, folder / "utt2speech_token.pt")
    (tmp_path / "train_reject").mkdir()
    torch.save({"u1": [4, 5]}, tmp_path / "train_reject/utt2speech_token.pt")
    listed = folder / "wav.scp"
    listed.write_text(listed.read_text() + "u5 cat sounds/0.wav |\n")
    read = prepare(encoders(), folder, tmp_path / "out.jsonl")
    assert [row.id for row in read.rows] == [f"u{i}" for i in range(5)]
    assert read.rows[0].speech == (1, 2)
    assert [side.speech for side in read.rows[1].sounds] == [
        codes_of(encoders(), folder / "sounds/1.wav"),
        (4, 5),
    ]
    assert [row.speaker for row in read.rows] == ["a", "b", "a", "b", "a"]
    assert all(len(row.speaker_vector) == 192 for row in read.rows)
    said = capsys.readouterr().out
    assert "(5 rows, 1 of them pairs)" in said
    assert "refused.jsonl (1 row)" in said
    (refused,) = map(json.loads, (tmp_path / "out.jsonl.refused.jsonl").read_text().splitlines())
    assert refused["where"] == f"{folder}/wav.scp:6"
    assert "'u5': wav.scp holds a command" in refused["what"]


@pytest.mark.parametrize("row_group_size", [3, 100])
def test_shards_with_recordings_inside(row_group_size: int, encoders: Directory, tmp_path: Path):
    def content(number: int) -> bytes:
        return sound_file(number, 0.3 + 0.05 * (number % 5), 24000 if number % 2 else 16000)

    rows = shard_rows(9, audio_data=content, reject_speech_token=lambda i: [i, 1] if i % 2 else None)
    rows[3] |= {"speech_token": [7, 8, 9], "utt_embedding": [1.0, 2.0]}
    rows[4] |= {"speech_token": [7, 8]}
    rows[5] |= {"speech_token": []}
    for number in range(3):
        part = rows[3 * number : 3 * number + 3]
        save_shard(tmp_path / f"shards/parquet_{number:09d}.tar", part, row_group_size)
    read = prepare(encoders(), tmp_path / "shards", tmp_path / "out.parquet")
    assert [row.id for row in read.rows] == [f"u{i}" for i in range(9)]
    for number, row in enumerate(read.rows):
        assert (row.pair is None) == (number % 2 == 0)
        assert not row.audio
        assert not any(side.audio for side in row.sounds)
        if number in (0, 2, 6, 8):
            (tmp_path / "one.wav").write_bytes(content(number))
            assert row.speech == codes_of(encoders(), tmp_path / "one.wav")
    assert (read.rows[3].sounds[0].speech, read.rows[3].speaker_vector) == ((7, 8, 9), (1.0, 2.0))
    assert read.rows[4].speech == (7, 8)
    assert len(read.rows[4].speaker_vector) == len(read.rows[5].speaker_vector) == 192
    assert read.rows[5].sounds[0].speech


def test_a_shard_without_recordings_needs_none(encoders: Directory, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Nor does a row with tokens whose recording is missing."""
    save_shard(tmp_path / "in/0.parquet", shard_rows(2, speech_token=[1, 2]))
    save_shard(tmp_path / "in/1.parquet", shard_rows(2, 2, speech_token=[3], audio_data=None))
    save_shard(tmp_path / "in/2.parquet", shard_rows(1, 4, audio_data=None))
    read = prepare(encoders(), tmp_path / "in", tmp_path / "out.jsonl")
    assert [row.speech for row in read.rows] == [(1, 2), (1, 2), (3,), (3,)]
    said = capsys.readouterr().out
    assert "(4 rows, 4 without a speaker vector)" in said
    assert "1  has no recording" in said


def broken(folder: Path) -> Path:
    """Two good rows among all that can be wrong with one."""
    save_sounds(folder, 2)
    soundfile.write(folder / "long.wav", sound(1, 3.0), 16000)
    soundfile.write(folder / "short.wav", sound(1, 0.05), 16000)
    soundfile.write(folder / "silent.wav", np.zeros(8000), 16000)
    soundfile.write(folder / "empty.wav", np.zeros(0), 16000)
    soundfile.write(folder / "telephone.wav", sound(1, 0.5, 8000), 8000)
    (folder / "noise.wav").write_bytes(b"not a sound")
    (folder / "copy.wav").write_bytes((folder / "1.wav").read_bytes())
    names = ["0", "long", "short", "silent", "empty", "telephone", "noise", "gone", "1"]
    rows: list[dict[str, Any]] = [{"id": name, "text": "one", "audio": f"{name}.wav"} for name in names]
    rows.insert(3, {"id": "wordless", "text": " ", "audio": "0.wav"})
    rows.append({"id": "twins", "text": "one", "chosen": "1.wav", "rejected": "copy.wav"})
    rows.append({"id": "said nothing", "text": "one", "audio": "silent.wav", "label": False})
    return lines(folder / "rows.jsonl", rows)


REASONS = {
    "long": "lasts 3.0 s, expected at most 2 s: cut it",
    "short": "lasts 0.05 s, expected at least 0.1 s",
    "silent": "is silent",
    "empty": "is empty",
    "telephone": "has 8000 samples a second, expected at least 16000",
    "noise": "cannot be read as sound",
    "gone": "there is no such recording",
    "twins": "chosen and rejected are the same",
}


def test_what_cannot_be_used_is_counted_and_named(
    encoders: Directory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source, out = broken(tmp_path), tmp_path / "out.jsonl"
    read = prepare(encoders(), source, out, "--max_seconds", "2")
    assert [row.id for row in read.rows] == ["0", "1", "said nothing"]
    wordless, *refused = map(json.loads, (tmp_path / "out.jsonl.refused.jsonl").read_text().splitlines())
    assert wordless == {"where": f"{source}:4", "what": "text: expected words, got ' '"}
    assert {row["id"]: row["what"][: len(REASONS[row["id"]])] for row in refused} == REASONS
    assert refused[0]["where"] == f"{tmp_path}/long.wav"
    summary = json.loads((tmp_path / "out.jsonl.summary.json").read_text())
    assert (summary["rows"], summary["refused"]) == (3, 9)
    assert sum(summary["reasons"].values()) == 9
    assert summary["reasons"]["lasts … s, expected at most … s: cut it"] == 1
    said = capsys.readouterr().out
    assert f"prepared:     {out} (3 rows)" in said
    assert f"refused:      {out}.refused.jsonl (9 rows)" in said
    assert "       1  is silent" in said


def test_it_can_stop_instead(encoders: Directory, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = recorded(tmp_path, 3)
    (tmp_path / "sounds/1.wav").write_bytes(b"not a sound")
    with pytest.raises(SystemExit):
        prepare(encoders(), source, tmp_path / "out.jsonl", "--on_bad_row", "stop")
    assert "row 'u1': " in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
    assert len(prepare(encoders(), source, tmp_path / "out.jsonl").rows) == 2


def test_nothing_left_is_an_error(encoders: Directory, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = recorded(tmp_path, 2)
    for number in range(2):
        (tmp_path / f"sounds/{number}.wav").write_bytes(b"not a sound")
    with pytest.raises(SystemExit):
        prepare(encoders(), source, tmp_path / "out.jsonl")
    assert "2 faults" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
    assert len((tmp_path / "out.jsonl.refused.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_seconds", "31"], "max_seconds must be at most 30"),
        (["--min_seconds", "30"], "less than max_seconds, got 30 and 30"),
        (["--batch_size", "0"], "batch_size must be at least 1"),
        (["--num_workers", "0"], "num_workers must be at least 1"),
        (["--out", "rows.txt"], "expected a name that ends in .jsonl or .parquet"),
        (["--directory", "nowhere"], "no directory nowhere"),
        (["--source", "nowhere.jsonl"], "there is no such file"),
        (["--trainer.device", "1"], "did you mean 'trainer.devices'?"),
    ],
)
def test_wrong_options(
    options: list[str], message: str, encoders: Directory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = recorded(tmp_path, 1)
    with pytest.raises(SystemExit):
        prepare(encoders(), source, tmp_path / "out.jsonl", *options)
    assert message in capsys.readouterr().err


def test_a_broken_model_is_not_the_fault_of_the_recordings(
    encoders: Directory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    directory = copied(encoders(), tmp_path / "model")
    Path(directory, "campplus.onnx").write_bytes(b"cut off")
    with pytest.raises(SystemExit):
        prepare(directory, recorded(tmp_path, 2), tmp_path / "out.jsonl")
    assert "campplus.onnx as an ONNX model, was it downloaded completely?" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl.refused.jsonl").exists()


class Tired(CosyVoiceTokenizer):
    """Gives up after so many windows."""

    left = 0

    def encode(self, waveforms: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        Tired.left -= 1
        if Tired.left < 0:
            raise KeyboardInterrupt
        return super().encode(waveforms)


def share(
    directory: str, source: Path, out: Path, window: int = 4, tired_after: int | None = None, **place: Any
) -> None:
    """One process's share in small windows."""
    encoders = RecordingEncoder.of(directory, 2, True)
    if tired_after is not None:
        Tired.left = tired_after + 1  # one call tries the models out
        encoders = replace(encoders, tokenizer=Tired(directory, 2))
    command.prepare_share(encoders, str(source), Target(out), Limits(), 4, 2, **place)


@pytest.fixture(params=["jsonl", "shards"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Eighteen rows, the last but one of them bad."""
    if request.param == "jsonl":
        path = recorded(tmp_path / "in", 18)
        (tmp_path / "in/sounds/16.wav").write_bytes(b"not a sound")
        return path
    rows = shard_rows(18, audio_data=lambda i: b"not a sound" if i == 16 else sound_file(i, 0.2 + i % 3 / 10))
    for number in range(3):
        save_shard(tmp_path / f"in/parquet_{number:09d}.tar", rows[6 * number : 6 * number + 6], 4)
    return tmp_path / "in"


def results(out: Path) -> list[bytes]:
    return [path.read_bytes() for path in (out, Target(out).refused, Target(out).summary)]


@pytest.mark.parametrize("tired_after", [0, 1, 3])
def test_a_killed_run_goes_on_where_it_was(tired_after: int, source: Path, encoders: Directory, tmp_path: Path):
    straight, out = tmp_path / "straight.jsonl", tmp_path / "out.jsonl"
    share(encoders(), source, straight)
    with pytest.raises(KeyboardInterrupt):
        share(encoders(), source, out, tired_after=tired_after)
    assert not out.exists()
    kept = [line for path in tmp_path.glob("out.jsonl.work.parts/*") for line in path.read_text().splitlines()]
    assert len(kept) == 4 * tired_after
    with pytest.raises(KeyboardInterrupt):
        share(encoders(), source, out, tired_after=4 - tired_after)  # 5 windows in all
    share(encoders(), source, out, tired_after=1)
    assert results(out) == results(straight)
    assert not list(tmp_path.glob("*.work*"))


@pytest.mark.parametrize(("world", "killed"), [(2, False), (3, True)])
def test_the_number_of_processes_changes_nothing(
    world: int, killed: bool, source: Path, encoders: Directory, tmp_path: Path
):
    straight, out = tmp_path / "straight.parquet", tmp_path / "out.parquet"
    share(encoders(), source, straight)
    if killed:  # begun alone, continued by several
        with pytest.raises(KeyboardInterrupt):
            share(encoders(), source, out, tired_after=1)
    for rank in range(world):
        assert not out.exists()
        share(encoders(), source, out, rank=rank, world=world)
    assert results(out) == results(straight)


def test_neighbours_in_a_shard_stay_together():
    windows = list(range(10))
    assert [command._share(windows, rank, 2, 1) for rank in range(2)] == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
    assert [command._share(windows, rank, 2, 3) for rank in range(2)] == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9]]
    assert [command._share(windows, rank, 3, 99) for rank in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_what_is_finished_is_not_done_again(encoders: Directory, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, out = recorded(tmp_path, 5), tmp_path / "out.jsonl"
    share(encoders(), source, out)
    before = results_of(out)
    share(encoders(), source, out, tired_after=-1)
    assert results_of(out) == before
    assert capsys.readouterr().out.count("(5 rows)") == 2


def results_of(out: Path) -> tuple[bytes, int]:
    return out.read_bytes(), out.stat().st_mtime_ns


@pytest.mark.parametrize("change", ["recording", "text", "model", "limits", "foreign"])
def test_other_inputs_are_not_mixed_in(change: str, encoders: Directory, tmp_path: Path):
    source, out = recorded(tmp_path, 3), tmp_path / "out.jsonl"
    share(encoders(), source, out)
    directory, limits = encoders(), Limits()
    if change == "recording":
        (tmp_path / "sounds/1.wav").write_bytes(sound_file(77))
    elif change == "text":
        source.write_text(source.read_text().replace("say 1", "say more"))
    elif change == "model":
        directory = copied(directory, tmp_path / "other")
        model = Path(directory, "speech_tokenizer_v2.batch.onnx")
        model.write_bytes(model.read_bytes() + b"\x32\x00")  # an empty note: the same numbers from another file
    elif change == "limits":
        limits = Limits(max_seconds=20.0)
    else:
        Target(out).summary.unlink()
    again = RecordingEncoder.of(directory, 2, True)
    with pytest.raises(ValueError, match="made with other settings or inputs: choose another file, or overwrite it"):
        command.prepare_share(again, str(source), Target(out), limits, 4)
    command.prepare_share(again, str(source), Target(out, overwrite=True), limits, 4)
    assert len(read_manifest(out).rows) == 3


def test_a_full_disk_leaves_what_was_to_be_replaced(
    encoders: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source, out = recorded(tmp_path, 3), tmp_path / "out.jsonl"
    share(encoders(), source, out)
    before = results_of(out), Target(out).summary.read_bytes()

    def full(rows: object, path: Path) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    encode = partial(command.prepare_share, RecordingEncoder.of(encoders(), 2, True), str(source))
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "write_manifest", full)
        with pytest.raises(OSError, match="No space left") as raised:
            encode(Target(out, overwrite=True), Limits(max_seconds=20.0), 4)
    assert raised.value.filename == str(out)
    assert (results_of(out), Target(out).summary.read_bytes()) == before
    assert Target(out).is_finished(json.loads(before[1])["made_with"])
    encode(Target(out, overwrite=True), Limits(max_seconds=20.0), 4)
    assert results_of(out)[0] == before[0][0]  # the same rows are taken
    assert Target(out).summary.read_bytes() != before[1]


@pytest.mark.parametrize("replaces", [False, True])
def test_a_kill_while_it_is_written_leaves_a_manifest_or_none_and_it_resumes(
    replaces: bool, encoders: Directory, tmp_path: Path
):
    source, out, limits = recorded(tmp_path, 3), tmp_path / "out.jsonl", Limits(max_seconds=20.0)
    encode = partial(command.prepare_share, RecordingEncoder.of(encoders(), 2, True), str(source))
    for step in range(20):
        for path in (out, Target(out).summary):
            path.unlink(missing_ok=True)
        if replaces:
            encode(Target(out), Limits(), 4)
        try:
            with killed_at(step):
                encode(Target(out, overwrite=replaces), limits, 4)
            break
        except Killed:
            assert len(read_manifest(out).rows if out.exists() else []) in ((3,) if replaces else (0, 3))
            encode(Target(out, overwrite=replaces), limits, 4)
            assert Target(out).is_finished(json.loads(Target(out).summary.read_text())["made_with"])
            with pytest.raises(ValueError, match="made with other settings"):
                encode(Target(out), Limits(), 4)
    else:
        pytest.fail("it never ends")
    assert step > 3


def test_only_what_changed_is_done_again(encoders: Directory, tmp_path: Path):
    """A mended recording does not cost the work on the others."""
    source, out = recorded(tmp_path, 12), tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        share(encoders(), source, out, tired_after=2)
    (tmp_path / "sounds/1.wav").write_bytes(sound_file(77))
    share(encoders(), source, out, tired_after=2)  # the first window again, and the last
    assert read_manifest(out).rows[1].speech == codes_of(encoders(), tmp_path / "sounds/1.wav")


def test_a_recording_that_the_model_cannot_take_leaves_its_neighbours_alone(encoders: Directory, tmp_path: Path):
    class Choosy(CosyVoiceTokenizer):
        def encode(self, waveforms: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            if any(len(waveform) == 8000 for waveform in waveforms):
                raise RuntimeError("half a second hurts")
            return super().encode(waveforms)

    source, out = recorded(tmp_path, 5), tmp_path / "out.jsonl"
    (tmp_path / "sounds/2.wav").write_bytes(sound_file(2, 0.5))
    choosy = replace(RecordingEncoder.of(encoders(), 2, True), tokenizer=Choosy(encoders(), 2))
    command.prepare_share(choosy, str(source), Target(out), Limits(), 8)
    assert [row.id for row in read_manifest(out).rows] == ["u0", "u1", "u3", "u4"]
    assert "half a second hurts" in Target(out).refused.read_text()
    out.unlink()
    with pytest.raises(ManifestError, match=r"row 'u2': .*RuntimeError: half a second hurts"):
        command.prepare_share(choosy, str(source), Target(out, on_bad_row="stop"), Limits(), 8)


def test_two_real_processes(encoders: Directory, tmp_path: Path):
    source = recorded(tmp_path, 20)
    prepare(encoders(), source, tmp_path / "one.jsonl", "--batch_size", "1")
    options = ["--directory", encoders(), "--source", str(source), "--out", str(tmp_path / "two.jsonl")]
    options += ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    said = in_two_processes(tmp_path, "prepare", *options, "--batch_size", "1")
    assert said.count("prepared:") == 1
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()

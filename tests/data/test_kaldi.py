# SPDX-License-Identifier: Apache-2.0
"""Kaldi-style folders: what stands where, and every gap by name."""

from pathlib import Path

import pytest
import torch
from sources import save_kaldi

from tts_align.data.manifest import read_manifest
from tts_align.data.records import ManifestError, Pair, Row, Sound


def faults(folder: Path) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        read_manifest(folder)
    return [str(fault) for fault in caught.value.faults]


def test_a_folder_of_recordings(tmp_path: Path):
    folder = save_kaldi(tmp_path / "train", 2, instruct="u0 be kind<|endofprompt|>\nu1\tsing  loud\n")
    path = folder / "sounds"
    assert read_manifest(folder).rows == (
        Row("u0", "say 0", speaker="a", audio=str(path / "0.wav"), instruct="be kind<|endofprompt|>"),
        Row("u1", "say 1", speaker="b", audio=str(path / "1.wav"), instruct="sing  loud"),
    )


def test_paths_start_from_the_folder_or_from_where_the_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = save_kaldi(tmp_path / "data/train", 3)
    (folder / "wav.scp").write_text(f"u0 data/train/sounds/0.wav\nu1 {folder}/sounds/1.wav\nu2 sounds/2.wav\n")
    monkeypatch.chdir(tmp_path)
    for name in (folder, Path("data/train")):
        read = read_manifest(name)
        assert [read.find(row.audio) for row in read.rows] == [folder / f"sounds/{i}.wav" for i in range(3)]


def test_tokens_vectors_and_rejected_speech(tmp_path: Path):
    folder = save_kaldi(tmp_path / "train", 3)
    torch.save({"u0": [1, 2], "u1": torch.tensor([3]), "u2": []}, folder / "utt2speech_token.pt")
    torch.save({"u0": [0.5, 1.5]}, folder / "utt2embedding.pt")
    torch.save({"a": [2.5, 3.5], "b": torch.tensor([4.5])}, folder / "spk2embedding.pt")
    (tmp_path / "train_reject").mkdir()
    torch.save({"u1": [4, 5], "u2": [6]}, tmp_path / "train_reject/utt2speech_token.pt")
    audio = [str(folder / f"sounds/{number}.wav") for number in range(3)]
    assert read_manifest(folder).rows == (
        Row("u0", "say 0", speaker="a", speech=(1, 2), audio=audio[0], speaker_vector=(0.5, 1.5)),
        Row("u1", "say 1", speaker="b", pair=Pair(Sound((3,), audio[1]), Sound((4, 5))), speaker_vector=(4.5,)),
        Row("u2", "say 2", speaker="a", pair=Pair(Sound((), audio[2]), Sound((6,))), speaker_vector=(2.5, 3.5)),
    )


def test_tokens_alone_make_a_folder(tmp_path: Path):
    (tmp_path / "text").write_text("u0 one\nu1 two\n")
    torch.save({"u1": [2], "u0": [1]}, tmp_path / "utt2speech_token.pt")
    assert [(row.id, row.speech) for row in read_manifest(tmp_path).rows] == [("u1", (2,)), ("u0", (1,))]


def test_commands_are_refused_and_never_run(tmp_path: Path):
    folder = save_kaldi(tmp_path / "train", 2)
    (folder / "wav.scp").write_text(f"u0 touch {tmp_path}/ran |\nu1 sounds/1.wav\n")
    (fault,) = faults(folder)
    assert fault.startswith(f"{folder}/wav.scp:1: utterance 'u0': wav.scp holds a command, which is never run")
    assert [row.id for row in read_manifest(folder, "drop").rows] == ["u1"]
    assert not (tmp_path / "ran").exists()


def test_every_gap_is_named(tmp_path: Path):
    folder = save_kaldi(tmp_path / "train", 3, text="u0 one\nu1\nu3 three\n", utt2spk="u0 a\nu1 a\nu3 a\n")
    assert faults(folder) == [
        f"{folder}/wav.scp:2: utterance 'u1' is missing in text",
        f"{folder}/wav.scp:3: utterance 'u2' is missing in text and utt2spk",
        f"{folder}/text:3: utterance 'u3' is missing in wav.scp",
    ]
    assert [row.id for row in read_manifest(folder, "drop").rows] == ["u0"]


def test_broken_tables_are_named(tmp_path: Path):
    folder = save_kaldi(tmp_path / "train", 2, text="u0 one\nu0 again\n")
    (folder / "utt2spk").write_bytes(b"u0 a\nu1 \xff\n")
    (folder / "utt2speech_token.pt").write_bytes(b"nothing")
    torch.save([1, 2], folder / "spk2embedding.pt")
    found = faults(folder)
    assert found[0] == f"{folder}/text:2: utterance 'u0' stands already in {folder}/text:1"
    assert found[1].startswith(f"{folder}/utt2spk:2: not UTF-8")
    assert found[2].startswith(f"{folder}/utt2speech_token.pt: not a file of torch.save")
    assert found[3] == f"{folder}/spk2embedding.pt: expected a dictionary of lists, got list"


def test_a_file_with_code_in_it_is_not_executed(tmp_path: Path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    folder = save_kaldi(tmp_path / "train", 1)
    torch.save({"u0": Trap()}, folder / "utt2speech_token.pt")
    assert "not a file of torch.save" in faults(folder)[0]
    assert not (tmp_path / "ran").exists()


def test_a_missing_recording_is_named(tmp_path: Path):
    folder = save_kaldi(tmp_path / "train", 2)
    (folder / "sounds/1.wav").unlink()
    assert faults(folder) == [f"{folder}/wav.scp:2: speech: there is no recording {folder}/sounds/1.wav"]

# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest

from tts_align.cli.demo import build as builder
from tts_align.cli.demo.build import GateError, Plan
from tts_align.cli.demo.gates import Gate
from tts_align.utils.files import write_json


class Bank:
    digest = "sound"

    def __init__(self, token_samples: int) -> None:
        self.token_samples = token_samples


@pytest.fixture
def made(monkeypatch):
    """Stages that write one file each and note that they ran; the gate passes when its value is 1."""
    ran: list[str] = []
    settings = {"value": 1.0, "break": ""}

    def stage(name):
        def make(self, out: Path, *_: object, **__: object) -> None:
            ran.append(name)
            (out / "model.safetensors").write_text(name)
            if settings["break"] == name:
                raise KeyboardInterrupt

        return make

    def gates(self, out: Path) -> None:
        ran.append("gates")
        gate = {"name": "accuracy", "value": settings["value"], "low": 0.9, "high": 1.0}
        (out / "gates.json").write_text(json.dumps([gate]))
        (out / "measured.json").write_text(json.dumps({"error": 0.5}))

    monkeypatch.setattr(builder, "PhraseBank", Bank)
    for name in ("_codec", "_recogniser", "_base", "_flow"):
        monkeypatch.setattr(builder._Build, name, stage(name))
    monkeypatch.setattr(builder._Build, "_gates", gates)
    return ran, settings


ALL = ["_codec", "_recogniser", "_recogniser", "_base", "_flow", "_flow", "gates"]


def test_ships_and_does_nothing_twice(tmp_path, made):
    ran, _ = made
    for _ in range(2):
        assert builder.build(tmp_path / "audio", work=tmp_path / "work") == tmp_path / "audio"
    assert ran == ALL
    assert {path.name for path in (tmp_path / "audio").iterdir()} == {
        *("base", "build.json", "codec", "flow", "judge", "labeller", "sentences")
    }
    assert len((tmp_path / "audio/sentences/test.jsonl").read_text("utf-8").splitlines()) == 576


def test_continues_after_an_interruption(tmp_path, made):
    ran, settings = made
    settings["break"] = "_base"
    with pytest.raises(KeyboardInterrupt):
        builder.build(tmp_path / "audio", work=tmp_path / "work")
    assert not (tmp_path / "audio").exists()
    settings["break"] = ""
    builder.build(tmp_path / "audio", work=tmp_path / "work")
    assert ran == [*ALL[:4], *ALL[3:]]


def test_a_changed_plan_makes_anew_what_depends_on_it(tmp_path, made):
    ran, _ = made
    builder.build(tmp_path / "audio", work=tmp_path / "work")
    ran.clear()
    builder.build(tmp_path / "audio", work=tmp_path / "work", plan=Plan(renderings=5))
    assert ran == ["_base", "gates"]
    ran.clear()
    builder.build(tmp_path / "audio", work=tmp_path / "work", plan=Plan(seed=1))
    assert ran == ALL


def test_a_failed_gate_ships_nothing(tmp_path, made):
    _, settings = made
    builder.build(tmp_path / "audio", work=tmp_path / "work")
    before = (tmp_path / "audio/build.json").read_text()
    settings["value"] = 0.5
    with pytest.raises(GateError, match="because of: accuracy"):
        builder.build(tmp_path / "audio", seed=3, work=tmp_path / "work")
    assert (tmp_path / "audio/build.json").read_text() == before


def test_what_was_there_stays_until_its_successor_is_whole(tmp_path, made, monkeypatch):
    """Parts are copied, the report cannot be written: the old folder is as it was, and nothing lies beside it."""
    builder.build(tmp_path / "audio", work=tmp_path / "work")
    before = (tmp_path / "audio/build.json").read_text()
    (tmp_path / "audio/build.json").write_text(f"{before} ")  # of another build

    def full(path: Path, value: object) -> None:
        if path.name == builder.REPORT:
            raise OSError(28, "No space left on device", str(path))
        write_json(path, value)

    monkeypatch.setattr(builder, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        builder.build(tmp_path / "audio", seed=3, work=tmp_path / "work")
    assert (tmp_path / "audio/build.json").read_text() == f"{before} "
    assert (tmp_path / "audio/codec").is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"audio", "work"}


def test_gate_says_where_the_number_must_lie():
    assert str(Gate("CER", 0.01, high=0.03)) == "passed  CER: 0.0100, must lie in [0, 0.03]"
    assert not Gate("CER", 0.04, high=0.03).passed
    assert not Gate("accuracy", 0.5, low=0.6).passed

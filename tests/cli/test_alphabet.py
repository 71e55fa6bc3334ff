# SPDX-License-Identifier: Apache-2.0
"""``characters: auto``: the alphabet is that of the transcripts, stays with the model, and is typed by nobody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace
from test_reward_stage import SIZES, spoken_rows
from tiny import save_recipe, save_rows

from tts_align.cli.alphabet import with_alphabet
from tts_align.cli.entry import run
from tts_align.data.table.rows import RowTable
from tts_align.models.reward.config import RewardSizes
from tts_align.objectives import Part

KEY = "model.reward.init_args.sizes.characters"
AUTO: dict[str, Any] = {"class_path": "RewardModel", "init_args": {"sizes": {**SIZES, "characters": "auto"}}}


def recipe(**changes: Any) -> Namespace:
    found = Namespace()
    for key, value in ({KEY: "auto", "data.manifest": None, "data.on_bad_row": "stop"} | changes).items():
        found[key] = value
    return found


def characters(recipe: Namespace, run: Path, command: str = "fit") -> Any:
    return with_alphabet(recipe, run, command)[KEY]


def test_it_is_every_character_of_what_was_heard_or_of_good_texts(tmp_path: Path):
    manifest = tmp_path / "rows.jsonl"
    rows = [
        '{"id": "a", "text": "辛い", "speech": [1], "label": true, "transcript": "からい"}',
        '{"id": "b", "text": "zz", "speech": [1], "label": false}',
        '{"id": "c", "text": "an", "speech": [1], "label": true}',
    ]
    manifest.write_text("\n".join(rows), "utf-8")
    more = save_rows(tmp_path, spoken_rows(), "more.jsonl")
    given = recipe(**{"data.manifest": str(manifest)})
    assert characters(given, tmp_path) == "anいから"
    assert given[KEY] == "auto"
    both = characters(recipe(**{"data.manifest": str(manifest), "model.reward_fit.manifest": more}), tmp_path)
    assert set("anいから") < set(both)
    assert set("hg") < set(both)


def test_a_large_manifest_is_looked_at_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not in memory, and nothing is left of it."""
    files: list[Path | None] = []

    def spy(rows: RowTable, *names: str) -> Any:
        files.append(rows.file)
        assert rows.file is not None
        assert rows.file.is_file()
        return columns(rows, *names)

    columns = RowTable.columns
    monkeypatch.setattr(RowTable, "columns", spy)
    monkeypatch.setattr("tts_align.data.table.read.STORED_FROM_BYTES", 1)
    manifest = save_rows(tmp_path, spoken_rows())
    before = sorted(tmp_path.iterdir())
    found = characters(recipe(**{"data.manifest": manifest}), tmp_path)
    rows = spoken_rows()
    assert set(found) == {letter for row in rows for letter in row.notes.get("transcript", row.target_text)}
    assert [file is not None and file.exists() for file in files] == [False]
    assert sorted(tmp_path.iterdir()) == before


def test_characters_that_are_given_stay(tmp_path: Path):
    given = recipe(**{KEY: "abc"})
    assert with_alphabet(given, tmp_path, "fit") is given


def test_without_transcripts_it_says_so(tmp_path: Path):
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text('{"id": "b", "text": "zz", "speech": [1], "label": false}\n')
    with pytest.raises(ValueError, match=r"characters is auto, but no row of .*rows.jsonl has a transcript"):
        characters(recipe(**{"data.manifest": str(manifest)}), tmp_path)
    assert characters(recipe(**{"data.manifest": "FILE"}), tmp_path, "sample") == "?"


def test_in_python_it_is_refused():
    with pytest.raises(ValueError, match=r"auto is for recipes; in Python give collect_characters"):
        RewardSizes(5, "auto")


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_a_run_keeps_its_alphabet_when_the_manifest_grows(tmp_path: Path, tiny_policy: Path):
    rows = spoken_rows()
    manifest = save_rows(tmp_path, rows)
    knobs = {"model__reward": AUTO, "model__reward_fit": {"epochs": 1}, "trainer__max_steps": 1}
    path = save_recipe(tmp_path, "diffro", tiny_policy, manifest, data__validation=manifest, **knobs)
    place = str(tmp_path / "run")
    done = run(["fit", "--config", path, "--run.directory", place])
    expected = "".join(sorted({letter for row in rows for letter in row.notes.get("transcript", row.target_text)}))
    assert done.model.parts[Part.REWARD].sizes.characters == expected
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text("utf-8"))
    assert saved["model"]["reward"]["init_args"]["sizes"]["characters"] == "auto"
    with Path(manifest).open("a", encoding="utf-8") as file:
        file.write('{"id": "new", "text": "ン", "speech": [1, 2], "label": true}\n')
    again = run(["validate", "--config", str(tmp_path / "run/config.yaml")])
    assert again.model.parts[Part.REWARD].sizes.characters == expected


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_rows_of_the_reward_model_alone_may_know_fewer_characters(tmp_path: Path, tiny_policy: Path):
    """The model that is trained on its own manifest is the one that the run builds: of all characters of both."""
    manifest, own = save_rows(tmp_path, spoken_rows()), save_rows(tmp_path, spoken_rows(), "own.jsonl")
    with Path(manifest).open("a", encoding="utf-8") as file:
        file.write('{"id": "new", "text": "ン", "speech": [1, 2], "label": true}\n')
    knobs = {"model__reward": AUTO, "model__reward_fit": {"epochs": 1, "manifest": own}, "trainer__max_steps": 1}
    path = save_recipe(tmp_path, "diffro", tiny_policy, manifest, data__validation=manifest, **knobs)
    done = run(["fit", "--config", path, "--run.directory", str(tmp_path / "run")])
    assert "ン" in done.model.parts[Part.REWARD].sizes.characters
    stored = RewardSizes.read(tmp_path / "run/reward/model/config.json").characters
    assert stored == done.model.parts[Part.REWARD].sizes.characters

# SPDX-License-Identifier: Apache-2.0
"""Two real processes learn what one learns, though each of them sees one class at a time (rules 4 and 5)."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import yaml
from processes import in_two_processes
from tiny import checkpoint_weights, gap, make_rows, save_recipe, save_rows
from tiny_sound import save_e2e_recipe, save_recordings, spoken_rows

from tts_align.cli.entry import run

PLACES = {"kto": "contrast/desirable", "kto on flipped labels": "contrast/undesirable", "tkto": ""}


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_two_processes(tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch):
    """TKTO from its labels on: two fits of KTO and one of TKTO, two rows a step, so a rank never sees both classes."""
    monkeypatch.setattr(sys, "argv", ["tts-align"])
    manifest = save_rows(tmp_path, make_rows(sentences=6, per_side=(1, 1)))
    held_out = save_rows(tmp_path, make_rows(sentences=3, per_side=(1, 1), seed=4), "held_out.jsonl")
    objective = {"name": "tkto", "sft_weight": 0.5}
    changes = {"data__rows_per_step": 2, "data__validation": held_out}
    path = save_recipe(tmp_path, objective, tiny_policy, manifest, **changes)
    flags = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.accelerator", "cpu"]
    said = in_two_processes(tmp_path, "fit", "--config", path, "--run.directory", "two", *flags)
    assert said.count("separation of the pair on held-out rows") == 1
    monkeypatch.chdir(tmp_path)
    alone = run(["fit", "--config", path, "--run.directory", "one"])
    assert alone.trainer.global_step == 6
    for name, place in PLACES.items():
        one, two = checkpoint_weights(tmp_path / "one" / place), checkpoint_weights(tmp_path / "two" / place)
        assert all(math.isfinite(float(value.sum())) for value in two.values())
        assert gap(one, two) < 1e-5, name
    saved = yaml.safe_load((tmp_path / "two" / "config.yaml").read_text())
    assert saved["trainer"]["devices"] in (2, "2")


STAGES = {"stage 1": "stage1", "stage 2": "stage2", "stage 3": ""}


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_two_processes_train_end_to_end(tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch):
    """E2E from recordings: stages 1, 2 and 3 in one call, with the bits of float32 sums as the only difference."""
    monkeypatch.setattr(sys, "argv", ["tts-align"])
    manifest = save_recordings(tmp_path, spoken_rows(sentences=4))
    held_out = save_recordings(tmp_path, spoken_rows(sentences=2, seed=4)[:2], "held_out.jsonl")
    path = save_e2e_recipe(tmp_path, tiny_policy, manifest, data__validation=held_out, data__rows_per_step=4)
    flags = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.accelerator", "cpu"]
    said = in_two_processes(tmp_path, "fit", "--config", path, "--run.directory", "two", *flags)
    assert said.count("stage 1 of end-to-end training") == 1
    monkeypatch.chdir(tmp_path)
    alone = run(["fit", "--config", path, "--run.directory", "one"])
    assert alone.trainer.global_step == 2
    for name, place in STAGES.items():
        one, two = checkpoint_weights(tmp_path / "one" / place), checkpoint_weights(tmp_path / "two" / place)
        assert all(math.isfinite(float(value.sum())) for value in two.values())
        assert gap(one, two) < 1e-5, name
    again = run(["validate", "--config", path, "--run.directory", "one"])
    assert again.model.objective.start == str(Path("one/stage2"))

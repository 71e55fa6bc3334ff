# SPDX-License-Identifier: Apache-2.0
"""Commands use the checkpoint that was heard best, and a run that a guard has stopped is not tested again."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from places import RECIPES
from tiny import checkpoint_weights, gap

from tts_align.cli.entry import run
from tts_align.evaluation.judges.base import Judge
from tts_align.training.callbacks.guards import HackingGuard
from tts_align.training.callbacks.keep_best import DevHearing, KeepBest
from tts_align.training.run import Run

pytestmark = [pytest.mark.whole_runs, pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")]
FEW = [
    "--trainer.max_steps",
    "3",
    "--trainer.max_epochs",
    "4",
    "--data.max_rows",
    "600",
    "--data.validation",
    "null",
    "--run.threads",
    "1",
]
FEW += ["--trainer.accelerator", "cpu", "--model.test.sentences", "2"]
SYMBOLIC = ["--config", str(RECIPES / "dpo.yaml"), "--config", str(RECIPES / "models/symbolic.yaml")]


def overlay(folder: Path, kind: type, **arguments: Any) -> list[str]:
    """A recipe's overlay with one callback that listens with the judge of the test."""
    named = f"{kind.__module__}.{kind.__qualname__}"
    arguments = {"prompts": "demo:audio/sentences/dev.jsonl", "use_test_judge": True, "sentences": 2} | arguments
    path = folder / f"{kind.__name__}.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks+": [{"class_path": named, "init_args": arguments}]}}))
    return ["--config", str(path)]


@pytest.fixture
def better_at_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is said, step 2 is heard best."""
    listen = KeepBest._listen

    def told(self: KeepBest, trainer: Any, module: Any, averaged: bool) -> DevHearing:
        found = listen(self, trainer, module, averaged)
        return DevHearing(found.step, 0.1 if found.step == 2 else 0.5, 0.1, 0.1, found.judged)

    monkeypatch.setattr(KeepBest, "_listen", told)


@pytest.mark.usefixtures("better_at_two")
def test_test_export_and_sample_use_what_was_heard_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    recipe = [*SYMBOLIC, *overlay(tmp_path, KeepBest, every_steps=1), *FEW, "--run.directory", "run"]
    cli = run(["fit", *recipe])
    chosen = torch.load("run/checkpoints/chosen-2.ckpt", weights_only=True)["state_dict"]
    assert gap(chosen, checkpoint_weights(tmp_path / "run")) > 0
    # What was tested is what was heard best, and so it is again.
    tested = {name: value for name, value in cli.model.state_dict().items() if name in chosen}
    assert gap(tested, chosen) == 0
    first = Path("run/test/utterances.jsonl").read_text()
    capsys.readouterr()
    run(["test", "--config", "run/config.yaml"])
    assert "checkpoint:   run/checkpoints/chosen-2.ckpt" in capsys.readouterr().out
    assert Path("run/test/utterances.jsonl").read_text() == first
    whole = Path("run/checkpoints/chosen-2.ckpt").read_bytes()
    Path("run/checkpoints/chosen-2.ckpt").write_bytes(whole[: len(whole) // 2])
    run(["export", "--config", "run/config.yaml", "--to", "spoiled"])
    said = capsys.readouterr().out
    assert "run/checkpoints/chosen-2.ckpt" in said
    assert "it was heard best; the last checkpoint is used instead: run/checkpoints/last.ckpt" in said
    Path("run/checkpoints/chosen-2.ckpt").write_bytes(whole)
    again = run(["fit", *recipe])  # finished: the table is shown, nothing is tested again
    assert again.trainer.state.fn == "fit"
    (tmp_path / "one.txt").write_text("a\n")
    spoken = run(
        [
            "sample",
            "--config",
            "run/config.yaml",
            "--prompts",
            "one.txt",
            "--out",
            "drawn.jsonl",
            "--speakers",
            "[sakura]",
        ]
    )
    assert "policy:       run/checkpoints/chosen-2.ckpt" in capsys.readouterr().out
    told = {name: value for name, value in spoken.model.state_dict().items() if name in chosen}
    assert gap(told, chosen) == 0
    run(["export", "--config", "run/config.yaml", "--to", "BETTER"])
    assert json.loads(Path("run/export.json").read_text())["checkpoint"] == "run/checkpoints/chosen-2.ckpt"
    # A run that goes on for longer continues from its last step, not from the best.
    longer = run(["fit", *recipe, "--trainer.max_steps", "4", "--run.test_after_fit", "false"])
    assert longer.trainer.global_step == 4
    kept = next(one for one in longer.trainer.callbacks if isinstance(one, KeepBest))
    assert [one.step for one in kept.heard] == [0, 1, 2, 3, 4]
    # Another checkpoint can still be asked for.
    run(["test", "--config", "run/config.yaml", "--ckpt_path", "run/checkpoints/last.ckpt"])
    assert "checkpoint:   run/checkpoints/last.ckpt" in capsys.readouterr().out


def test_a_run_that_a_guard_has_stopped_is_not_tested_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HackingGuard, "reason", lambda self, patience: "harm" if len(self.heard) > 1 else "")
    recipe = [*SYMBOLIC, *overlay(tmp_path, HackingGuard, every_steps=1), *FEW, "--run.directory", "run"]
    assert run(["fit", *recipe]).trainer.global_step == 1
    assert Run("run").stopped() == "step 1: harm"
    heard: list[int] = []
    judge = next(cls for cls in Judge.__subclasses__() if cls.__name__ == "SymbolicJudge")
    monkeypatch.setattr(judge, "judge", lambda *_: heard.append(1))
    before = os.stat("run/test/summary.json").st_mtime_ns
    time.sleep(0.01)
    assert run(["fit", *recipe]).trainer.global_step == 1
    assert os.stat("run/test/summary.json").st_mtime_ns == before
    assert heard == []


def test_the_overlay_runs_and_keeps_the_callbacks_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """``recipes/keep_best.yaml`` as it stands, only shorter, and on a recipe with callbacks of its own."""
    requests = KeepBest.requests
    monkeypatch.setattr(KeepBest, "requests", lambda self: requests(self)[:6])
    named = ["--config", str(RECIPES / "kto.yaml"), "--config", str(RECIPES / "keep_best.yaml")]
    short = ["--trainer.max_steps", "1", "--data.max_rows", "600", "--data.validation", "null", "--run.threads", "1"]
    cli = run(["fit", *named, *short, "--model.test", "null", "--run.directory", str(tmp_path / "run")])
    best = next(one for one in cli.trainer.callbacks if isinstance(one, KeepBest))
    assert [(one.step, one.judged) for one in best.heard] == [(0, 6), (1, 6)]
    assert Run(tmp_path / "run").chosen.name.startswith("chosen-")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(["fit", "--config", str(RECIPES / "diffro.yaml"), *named[2:], "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    kinds = [one["class_path"].rpartition(".")[2] for one in printed]
    assert kinds == ["HackingGuard", "CollapseGuard", "KeepBest"]

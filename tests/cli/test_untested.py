# SPDX-License-Identifier: Apache-2.0
"""A run without test settings says how to get a before and after, and what it says works."""

from __future__ import annotations

from pathlib import Path

import pytest
from places import RECIPES

from tts_align.cli.entry import run
from tts_align.training.run import Run, how_to_test

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")


def test_the_command_that_is_printed_tests_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "run"
    recipes = [part for name in ("sft", "models/symbolic") for part in ("--config", str(RECIPES / f"{name}.yaml"))]
    small = {"run.directory": folder, "model.test": "null", "trainer.max_steps": 1, "data.max_rows": 32}
    small |= {"trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false", "trainer.callbacks": "null"}
    run(["fit", *recipes, *(part for name, value in small.items() for part in (f"--{name}", str(value)))])
    printed = capsys.readouterr().out
    assert "not tested:   the recipe names no test sentences" in printed
    assert not (folder / "test").exists()
    command = next(line.split() for line in printed.splitlines() if line.strip().startswith("tts-align test"))
    assert command[:4] == ["tts-align", "test", "--config", str(folder / "config.yaml")]
    sentences = "demo:audio/sentences/dev.jsonl"
    words = [sentences if word == "sentences.txt" else word for word in command[1:]]
    run([*words, "--model.test.sentences", "2", "--model.test.speakers", "[sakura]", "--model.test.audio", "0"])
    assert (folder / "test").is_dir()


def test_without_a_judge_it_names_one():
    said = how_to_test(Run("runs/a"), has_judge=False)
    assert "and a recogniser" in said
    judge = "--model.judge WhisperJudge --model.judge.model FOLDER --model.judge.language CODE"
    assert said.endswith(f"--model.test.prompts sentences.txt {judge}")

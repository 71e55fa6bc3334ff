# SPDX-License-Identifier: Apache-2.0
"""Every recipe runs as it stands, only shorter, on the embedded audio experiment."""

import json
from pathlib import Path

import pytest

from tts_align.cli import run
from tts_align.objectives import Objective

RECIPES = Path(__file__).parents[1] / "recipes"
SHORT = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--data.max_rows", "1500"]
TESTED = ["--model.test.sentences", "3", "--model.test.audio", "1", "--run.threads", "1"]


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "tkto"])
def test_a_recipe_trains_tests_and_says_where_things_are(name: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    place = tmp_path / name
    cli = run(["fit", "--config", str(RECIPES / f"{name}.yaml"), *SHORT, *TESTED, "--run.directory", str(place)])
    assert cli.trainer.global_step == 2
    said = capsys.readouterr().out
    assert str(place / "test") in said
    assert "accuracy" in said
    summary = json.loads((place / "test/summary.json").read_text())
    for system in ("base", "aligned"):
        assert set(summary[system]) == {"accuracy", "cer", "nearest_cer", "bad_case_ratio"}
        assert all(set(one) == {"value", "low", "high", "n"} for one in summary[system].values())
        assert summary[system]["accuracy"]["n"] == 6
    assert len(list((place / "test/audio").glob("*.wav"))) == 2
    figures = {path.name for path in (place / "test").glob("*.png")}
    of_the_pair = {"token_rewards.png", "token_weights.png"} if name == "tkto" else set()
    assert figures == {"likelihood.png"} | of_the_pair
    assert (place / "config.yaml").is_file()


def test_every_objective_has_a_recipe_and_a_test():
    built_in = {name for name, cls in Objective.registry.items() if cls.__module__.startswith("tts_align.")}
    assert {path.stem for path in RECIPES.glob("*.yaml")} >= built_in
    assert {path.stem for path in (RECIPES.parent / "tests/objectives").glob("test_*.py")} >= {
        f"test_{name}" for name in built_in
    }


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_opens_with_its_command(path: Path):
    head = path.read_text("utf-8").split("\n\n")[0]
    assert head.startswith("# ")
    assert "tts-align fit --config recipes/" in head

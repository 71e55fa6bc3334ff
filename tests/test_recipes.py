# SPDX-License-Identifier: Apache-2.0
"""Every recipe runs as it stands, only shorter, on the embedded audio experiment."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import RECIPES, ROOT, with_short_hearings
from sharded import processes
from tiny import checkpoint_weights, gap

from tts_align.cli.entry import run
from tts_align.models.policy.qwen2 import Qwen2CodecLM
from tts_align.objectives import Objective

pytestmark = pytest.mark.whole_runs

SHORT = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--data.max_rows", "64"]
OF_ITS_OWN = {"diffro": ["--model.reward_fit.epochs", "1"], "dpo": ["--data.max_rows", "800"]}
"""What makes a stage before the policy's short, and rows enough for pairs."""
TESTED = [
    "--model.test.sentences",
    "3",
    "--model.test.audio",
    "1",
    "--model.test.forgetting",
    "false",
    "--run.threads",
    "1",
]


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "tkto", "diffro"])
def test_a_recipe_trains_tests_and_says_where_things_are(name: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    place = tmp_path / name
    short = [*SHORT, *OF_ITS_OWN.get(name, [])]
    recipe = with_short_hearings(name, tmp_path) if name == "diffro" else RECIPES / f"{name}.yaml"
    cli = run(["fit", "--config", str(recipe), *short, *TESTED, "--run.directory", str(place)])
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


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "tkto", "mtr", "diffro"])
def test_the_symbolic_overlay_serves_every_objective_it_names(name: str, tmp_path: Path):
    """With its own constants, as far as the first steps; the reward model reads its codebook."""
    short = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--data.max_rows", "64"]
    if name == "diffro":
        short += ["--model.reward_fit.epochs", "1"]
    if name == "dpo":
        short += ["--data.max_rows", "800"]
    short += ["--trainer.limit_test_batches", "1"] if name == "mtr" else TESTED
    recipes = ["--config", str(RECIPES / f"{name}.yaml"), "--config", str(RECIPES / "models/symbolic.yaml")]
    cli = run(["fit", *recipes, *short, "--run.threads", "1", "--run.directory", str(tmp_path / name)])
    assert cli.trainer.global_step == 2
    assert cli.model.policy.layout.codebook_size == 196
    assert (tmp_path / name / "test" / ("reward.json" if name == "mtr" else "summary.json")).is_file()


END_TO_END = ((), ("rm", "stage2"), ("rm_fm", "scratch", "stage2"), ("rm_fm_lm", "stage2"), ("cascaded",))


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:The number of training batches .*")
@pytest.mark.parametrize("overlays", END_TO_END, ids="-".join)
def test_end_to_end_from_nothing_but_the_package(overlays: tuple[str, ...], tmp_path: Path):
    """All stages of recipes/e2e.yaml, and the ablations, with a few rows."""
    recipes = [with_short_hearings("e2e", tmp_path), *(RECIPES / "e2e" / f"{name}.yaml" for name in overlays)]
    named = [word for path in recipes for word in ("--config", str(path))]
    short = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "1", "--data.max_rows", "30"]
    if overlays:
        short += ["--data.validation", "null", "--trainer.callbacks", "null"]
    fits = ["--model.stage_fit.epochs", "1", "--model.stage_fit.second_epochs", "1"]
    fits += ["--model.vocoder.init_args.steps", "1"]
    place = tmp_path / "run"
    cli = run(["fit", *named, *short, *fits, *TESTED, "--run.directory", str(place)])
    assert cli.trainer.global_step == 1
    last = 2 if {"stage2", "cascaded"} & set(overlays) else 3
    assert cli.model.objective.stage == last
    stages = sorted(path.name for path in place.glob("stage*"))
    assert stages == [f"stage{number}" for number in range(1, last)]
    losses = {"rm": {"reward"}, "cascaded": {"reward"}, "rm_fm": {"reward", "flow"}}
    expected = losses.get(overlays[0] if overlays else "", {"reward", "flow", "policy"})
    trained = torch.load(place / "stage1/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    bridges = {key.split(".")[2] for key in trained if key.startswith("objective.bridges.")}
    assert bridges == expected
    summary = json.loads((place / "test/summary.json").read_text())
    assert summary["base"]["cer"]["n"] == summary["aligned"]["cer"]["n"] == 6
    if overlays:
        return
    # Tested again by a process that knows only the run: the same numbers.
    before = (place / "test/utterances.jsonl").read_text()
    run(["test", "--config", str(place / "config.yaml")])
    assert (place / "test/utterances.jsonl").read_text() == before
    # Spoken and judged by the models of the run's stages: what is said is what the test said.
    (tmp_path / "one.jsonl").write_text(json.dumps({"id": "one", "text": "このカレーは辛い"}) + "\n")
    spoken = ["--prompts", str(tmp_path / "one.jsonl"), "--out", str(tmp_path / "drawn.jsonl"), "--samples", "1"]
    recipe = ["--config", str(place / "config.yaml")]
    cli = run(["sample", *recipe, *spoken, "--speakers", "[sakura]", "--audio", "true"])
    trained = torch.load(place / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    learnt = {key: value for key, value in trained.items() if key.startswith("parts.flow.")}
    assert learnt
    for key, value in learnt.items():
        torch.testing.assert_close(cli.model.state_dict()[key], value, rtol=0, atol=0)
    assert [path.name for path in (tmp_path / "drawn.jsonl.audio").glob("*.wav")] == ["one-sakura-0.wav"]
    run(["judge", *recipe, "--candidates", str(tmp_path / "drawn.jsonl"), "--out", str(tmp_path / "heard.jsonl")])
    heard = json.loads((tmp_path / "heard.jsonl").read_text())
    assert "error" not in heard
    assert heard["cer"] >= 0


FEW_BATCHES = ["--trainer.limit_test_batches", "2", "--trainer.limit_val_batches", "2"]


def test_a_reward_model_is_trained_tested_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture):
    place = tmp_path / "mtr"
    recipe = ["--config", str(RECIPES / "mtr.yaml"), "--run.directory", str(place), "--run.threads", "1"]
    cli = run(
        ["fit", *recipe, "--data.max_rows", "64", "--trainer.max_steps", "2", "--trainer.max_epochs", "1", *FEW_BATCHES]
    )
    assert cli.trainer.global_step == 2
    assert f"reward model: {place / 'model'}" in capsys.readouterr().out
    assert set(json.loads((place / "test/reward.json").read_text())) == {"cer", "speaker_accuracy"}
    assert (place / "model/model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:The number of training batches .*")
@pytest.mark.parametrize("name", ["sft", "tkto", "mtr", "diffro", "e2e"])
def test_half_precision_serves_every_objective(name: str, tmp_path: Path):
    """DPO's run is below, KTO is in TKTO's; weights stay in float32, and what is heard is heard in full precision."""
    short = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "1", "--data.max_rows", "30"]
    short += ["--run.directory", str(tmp_path / "run"), "--run.threads", "1"]
    recipe = with_short_hearings(name, tmp_path) if name in ("diffro", "e2e") else RECIPES / f"{name}.yaml"
    if name == "e2e":
        short += [
            "--model.stage_fit.epochs",
            "1",
            "--model.vocoder.init_args.steps",
            "1",
            "--data.validation",
            "null",
            "--trainer.callbacks",
            "null",
        ]
        short += ["--config", str(RECIPES / "e2e/rm.yaml"), "--config", str(RECIPES / "e2e/stage2.yaml")]
    short += ["--trainer.limit_test_batches", "1"] if name == "mtr" else [*TESTED, "--model.test.sentences", "1"]
    short += ["--model.reward_fit.epochs", "1"] if name == "diffro" else []
    run(["fit", "--config", str(recipe), "--config", str(RECIPES / "precision/bf16.yaml"), *short])
    trained = checkpoint_weights(tmp_path / "run")
    assert all(value.dtype == torch.float32 for value in trained.values())
    assert all(value.isfinite().all() for value in trained.values())
    if name != "mtr":
        summary = json.loads((tmp_path / "run/test/summary.json").read_text())
        assert summary["base"]["cer"]["value"] < 0.5


OVERLAYS = [[path] for kind in ("strategy", "precision") for path in sorted((RECIPES / kind).glob("*.yaml"))]
OVERLAYS += [[RECIPES / "strategy/fsdp.yaml", RECIPES / "precision/bf16.yaml"]]


def test_every_overlay_trains_and_tests_on_two_processes(tmp_path: Path):
    """Those of strategy and precision, and sharding in bfloat16; all in one pair of processes, one after the other."""
    overlays = {"-".join(path.stem for path in paths): paths for paths in OVERLAYS}
    assert set(overlays) >= {"ddp", "fsdp", "bf16", "fsdp-bf16"}
    plain = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1", "--model.lr_scheduler", "null"]
    ours = [*SHORT, *OF_ITS_OWN["dpo"], *TESTED, *plain, "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    verbs = []
    for name, paths in overlays.items():
        named = [word for path in (RECIPES / "dpo.yaml", *paths) for word in ("--config", str(path))]
        verbs.append(shlex.join(["fit", *named, *ours, "--run.directory", str(tmp_path / name)]))
    processes(2, tmp_path, *verbs)
    trained = {name: checkpoint_weights(tmp_path / name) for name in overlays}
    for name in overlays:
        summary = json.loads((tmp_path / name / "test/summary.json").read_text())
        assert summary["base"]["accuracy"]["n"] == summary["aligned"]["accuracy"]["n"] == 6, name
        assert all(value.dtype == torch.float32 for value in trained[name].values()), name
    start = Qwen2CodecLM("demo:audio/base").state_dict()
    moved = gap({f"policy.{key}": value for key, value in start.items()}, trained["ddp"])
    assert gap(trained["ddp"], trained["fsdp"]) < 1e-6 < 0.001 * moved
    assert gap(trained["bf16"], trained["fsdp-bf16"]) < 0.05 * moved
    # The command starts its processes itself, too, where torchrun has not.
    recipes = ["--config", str(RECIPES / "dpo.yaml"), "--config", str(RECIPES / "strategy/fsdp.yaml")]
    alone = [*ours, "--run.test_after_fit", "false", "--run.directory", str(tmp_path / "started")]
    command = [sys.executable, "-m", "tts_align", "fit", *recipes, *alone]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert gap(checkpoint_weights(tmp_path / "started"), trained["fsdp"]) == 0


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

# SPDX-License-Identifier: Apache-2.0
"""A reward model is trained, kept, found again, and used; through the command, as a person would."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_two_processes
from tiny import CODES, LORA, REWARD_SIZES, checkpoint_weights, gap, make_rows, save_recipe, save_rows, weights

from tts_align.cli import entry as cli
from tts_align.cli.entry import run
from tts_align.data.records import Row
from tts_align.models.policy.qwen2 import Qwen2CodecLM
from tts_align.models.reward.model import RewardModel
from tts_align.objectives import Part
from tts_align.training.module import AlignModule

pytestmark = [pytest.mark.whole_runs, pytest.mark.filterwarnings("ignore:.*does not have many workers.*")]
SIZES = {
    "codebook_size": CODES,
    "characters": "abcdefgh ",
    "attributes": [{"name": "mood", "kind": "classes", "classes": ["happy", "sad"]}],
    **REWARD_SIZES,
}
NEW = {"class_path": "RewardModel", "init_args": {"sizes": SIZES}}
MOODS = ("happy", "sad")


def spoken_rows(**options: Any) -> list[Row]:
    """Rows with moods, and for bad speech what was heard."""
    return [
        replace(
            row,
            attributes={"mood": MOODS[number % 2]},
            notes={} if row.desirable else {"transcript": "hg"},
        )
        for number, row in enumerate(make_rows(**options))
    ]


@pytest.fixture
def recipe(tmp_path: Path, tiny_dropout: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Write a recipe of DiffRO: four steps for a new reward model, four for the policy; both have dropout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tts-align"])
    monkeypatch.delenv(cli.DEBUG, raising=False)
    manifest = save_rows(tmp_path, spoken_rows())
    held_out = save_rows(tmp_path, spoken_rows(sentences=3, seed=9), "held_out.jsonl")

    def write(objective: Any = "diffro", policy: Path = tiny_dropout, **changes: Any) -> str:
        knobs = {"data__validation": held_out, "run__checkpoint_every": 1, "model__reward": NEW} | changes
        if objective != "mtr":
            knobs = {"model__reward_fit": {"epochs": 1, "learning_rate": 0.05}} | knobs
        return save_recipe(tmp_path, objective, policy, manifest, **knobs)

    return write


def fit(path: str, directory: str, *flags: str) -> Any:
    return run(["fit", "--config", path, "--run.directory", directory, *flags])


def final(directory: str) -> dict[str, torch.Tensor]:
    return checkpoint_weights(Path(directory))


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# --- mtr alone ---


def test_a_reward_model_is_trained_tested_and_kept(
    recipe: Callable[..., str], capsys: pytest.CaptureFixture[str], tiny_dropout: Path
):
    done = fit(recipe("mtr", run__test_after_fit=True), "runs/mtr")
    said = capsys.readouterr().out
    assert "reward model: runs/mtr/model" in said
    assert done.trainer.global_step == 4
    trained = done.model.parts[Part.REWARD]
    kept = RewardModel("runs/mtr/model")
    assert same(kept, trained)
    assert all(name.startswith("parts.reward.") for name in final("runs/mtr"))
    # The policy is only there for its speech tokens.
    assert gap(weights(Qwen2CodecLM(str(tiny_dropout))), weights(Qwen2CodecLM(str(tiny_dropout)))) == 0
    assert not any(value.requires_grad for value in done.model.policy.parameters())
    numbers = json.loads(Path("runs/mtr/test/reward.json").read_text())
    assert numbers.keys() == {"cer", "mood_accuracy"}
    assert numbers["cer"]["n"] == numbers["mood_accuracy"]["n"] == 6
    assert "mood_accuracy" in said
    # `test` says the same of the saved run.
    Path("runs/mtr/test/reward.json").unlink()
    run(["test", "--config", "runs/mtr/config.yaml"])
    assert json.loads(Path("runs/mtr/test/reward.json").read_text()) == numbers


# --- diffro, from nothing ---


def test_fit_trains_the_reward_model_first(recipe: Callable[..., str], capsys: pytest.CaptureFixture[str]):
    done = fit(recipe(), "runs/one")
    assert "the reward model: mtr" in capsys.readouterr().out
    reward = done.model.parts[Part.REWARD]
    assert same(RewardModel("runs/one/reward/model"), reward)
    assert not reward.training
    assert not any(value.requires_grad for value in reward.parameters())
    assert done.trainer.global_step == 4
    assert all(name.startswith("policy.") for name in final("runs/one"))
    metrics = done.trainer.callback_metrics
    for name in ("reward", "reward_asr", "kl", "gradient_norm", "gradient_clipped", "saturated", "reward_bin0"):
        assert math.isfinite(metrics[f"train/{name}"]), name
    assert metrics["val/reward"] < 0
    # A reward model that the recipe names is not trained again, and the policy learns the same from it.
    named = {"class_path": "RewardModel", "init_args": {"directory": "runs/one/reward/model"}}
    with pytest.raises(SystemExit):
        fit(recipe(model__reward=named), "runs/two")
    assert "is trained already; leave it out, or pass --model.reward_fit null" in capsys.readouterr().err
    other = fit(recipe(model__reward=named), "runs/two", "--model.reward_fit", "null")
    assert not Path("runs/two/reward").exists()
    assert gap(final("runs/one"), final("runs/two")) == 0
    assert same(other.model.parts[Part.REWARD], reward)


def test_validate_finds_the_reward_model_of_the_run(
    recipe: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    path = recipe()
    before = fit(path, "runs/one").trainer.callback_metrics["val/reward"]
    again = run(["validate", "--config", path, "--run.directory", "runs/one"])
    assert again.trainer.callback_metrics["val/reward"] == pytest.approx(float(before), rel=1e-6)
    Path("runs/one/reward/model").rename("runs/elsewhere")
    with pytest.raises(SystemExit):
        run(["validate", "--config", path, "--run.directory", "runs/one"])
    assert "there is no trained reward model in runs/one/reward/model" in capsys.readouterr().err


class KilledError(BaseException):
    """What nobody catches."""


@pytest.mark.parametrize(
    ("at", "changes"),
    [
        (2, {}),
        (6, {}),
        (7, {"model__policy__init_args__lora": {"rank": LORA.rank, "alpha": LORA.alpha}}),
        (7, {"objective": {"name": "diffro", "rollout": "free", "resample": False}}),
    ],
    ids=["reward model", "policy", "policy, adapters", "policy, free roll-outs"],
)
def test_interrupted_in_any_stage_it_goes_on(
    at: int, changes: dict[str, Any], recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    """Killed in a step of either fit, the same command ends with the weights of an uninterrupted run."""
    path = recipe(**changes)
    fit(path, "runs/whole")
    steps, original = [0], AlignModule.training_step

    def step(self: AlignModule, *given: Any) -> Any:
        steps[0] += 1
        if steps[0] == at:
            raise KilledError
        return original(self, *given)

    monkeypatch.setattr(AlignModule, "training_step", step)
    with pytest.raises(KilledError):
        fit(path, "runs/cut")
    fit(path, "runs/cut")
    assert steps[0] == 9  # eight steps and the one that died
    for place in ("", "/reward"):
        assert gap(final(f"runs/whole{place}"), final(f"runs/cut{place}")) == 0
    start = 0.0 if "model__policy__init_args__lora" in changes else 1e-6
    assert max(float(value.abs().max()) for value in final("runs/whole").values()) > start


def test_overwrite_removes_the_reward_model_too(recipe: Callable[..., str]):
    path = recipe()
    fit(path, "runs/one")
    first = Path("runs/one/reward/checkpoints/last.ckpt").stat().st_mtime_ns
    fit(path, "runs/one", "--run.overwrite", "true")
    assert Path("runs/one/reward/checkpoints/last.ckpt").stat().st_mtime_ns != first


def test_the_reward_model_is_trained_as_told(recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[Any, ...]] = []
    original = AlignModule.on_fit_start

    def start(self: AlignModule) -> None:
        data, trainer = self.trainer.datamodule, self.trainer  # type: ignore[attr-defined]
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        smoothing = getattr(getattr(self.objective, "regularisers", None), "label_smoothing", None)
        seen.append((type(self.objective).__name__, trainer.max_epochs, lr, data.rows_per_step, smoothing))
        original(self)

    monkeypatch.setattr(AlignModule, "on_fit_start", start)
    told = {"epochs": 2, "learning_rate": 0.02, "rows_per_step": 8, "label_smoothing": 0.1, "decay_steps": 4}
    fit(recipe(model__reward_fit=told), "runs/one")
    state = torch.load("runs/one/reward/checkpoints/last.ckpt", weights_only=True)
    assert state["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.02 / 20)
    assert not torch.load("runs/one/checkpoints/last.ckpt", weights_only=True)["lr_schedulers"]
    assert seen == [("MTR", 2, 0.02, 8, 0.1), ("DiffRO", 1, 0.1, 4, None)]


def test_reward_fit_without_effect(recipe: Callable[..., str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        fit(recipe("mtr", model__reward_fit={"epochs": 1}), "runs/one")
    assert "model.reward_fit has no effect: MTR does not train one first" in capsys.readouterr().err


# --- two processes ---


@pytest.mark.parametrize(
    "objective", ["diffro", {"name": "diffro", "rollout": "free", "resample": False, "sft_weight": 0.0}]
)
def test_two_processes_learn_what_one_learns(
    objective: Any, recipe: Callable[..., str], tmp_path: Path, tiny_policy: Path
):
    """The reward model and the policy, a row on each rank; noise and roll-outs belong to rows, dropout does not."""
    plain = {"class_path": "RewardModel", "init_args": {"sizes": SIZES | {"dropout": 0.0}}}
    path = recipe(objective, tiny_policy, data__rows_per_step=2, model__reward=plain)
    flags = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--data.max_rows", "6"]
    in_two_processes(tmp_path, "fit", "--config", path, "--run.directory", "two", *flags)
    alone = fit(path, "one", "--data.max_rows", "6")
    assert alone.trainer.global_step == 3
    for place in ("", "/reward"):
        assert gap(final(f"one{place}"), final(f"two{place}")) < 1e-5, place or "policy"

# SPDX-License-Identifier: Apache-2.0
"""Two and four processes that share one policy (FSDP2) learn what one learns, and hand checkpoints to each other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from places import RECIPES
from safetensors.torch import load_file
from sharded import CASES, HALF, STEPS, processes, train
from tiny import checkpoint_weights, gap, make_rows, save_policy, save_recipe, save_rows
from tiny_sound import save_e2e_recipe, save_recordings, spoken_rows
from torch import nn

from tts_align.cli.entry import run
from tts_align.evaluation.prompts import SentencePrompt, write_prompts
from tts_align.training.sharding import ShardedStrategy, check_precision, check_strategy
from tts_align.utils.files import read_json_lines
from tts_align.utils.sharded import is_sharded, plain, share_of, whole

pytestmark = [pytest.mark.whole_runs, pytest.mark.filterwarnings("ignore:.*does not have many workers.*")]
OVERLAY = ["--config", str(RECIPES / "strategy/fsdp.yaml"), "--trainer.devices", "2"]
SPEAKS = {
    "model__judge": {"class_path": "sharded.Silent"},
    "model__sampling": {"max_ratio": 12},
    "model__test": {"prompts": "prompts.jsonl", "samples": 1},
    "run__test_after_fit": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that is trained here, by one process, by two, and by one and four from where two were half-way."""
    folder = tmp_path_factory.mktemp("sharded")
    save_policy(folder / "policy")
    save_rows(folder)
    save_rows(folder, make_rows(sentences=4, seed=4), "held_out.jsonl")
    save_recordings(folder, spoken_rows(sentences=8))
    write_prompts(folder / "prompts.jsonl", [SentencePrompt(f"s{number}", "abcdefgh"[number]) for number in range(8)])
    (folder / "pair").mkdir()
    few = save_rows(folder, make_rows(sentences=6), "few.jsonl")
    tkto = save_recipe(folder / "pair", {"name": "tkto"}, folder / "policy", few, **SPEAKS)
    (folder / "stages").mkdir()
    sounds = str(folder / "sounds.jsonl")
    e2e = save_e2e_recipe(folder / "stages", folder / "policy", sounds, data__rows_per_step=4)
    commands = []
    for name, recipe in (("pair", tkto), ("stages", e2e)):
        commands.append(["fit", "--config", recipe, *OVERLAY, "--run.directory", str(folder / name / "two")])
    config = ["--config", str(folder / "pair/two/config.yaml")]
    commands.append(["sample", *config, "--prompts", "prompts.jsonl", "--out", "two.jsonl"])
    commands.append(["validate", "--config", str(folder / "stages/two/config.yaml"), "--data.validation", sounds])
    processes(2, folder, "train", "check", *(" ".join(command) for command in commands))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in CASES:
            train(name, folder, folder / "processes1")
            train(name, folder, folder / "resumed1", checkpoint=folder / "processes2" / name / "half.ckpt")
        for name, recipe in (("pair", tkto), ("stages", e2e)):
            run(["fit", "--config", recipe, "--run.directory", str(folder / name / "one")])
        run(["sample", "--config", "pair/one/config.yaml", "--prompts", "prompts.jsonl", "--out", "one.jsonl"])
    processes(4, folder, "resume 2")
    processes(1, folder, "resume 2 sft")
    return folder


def result(folder: Path, how: str, name: str) -> Any:
    return torch.load(folder / how / name / "result.pt", weights_only=False)


def losses(logged: list[dict[str, float]]) -> list[dict[str, float]]:
    return [one for one in logged if "train/loss" in one]


def held_out(logged: list[dict[str, float]]) -> list[dict[str, float]]:
    return [one for one in logged if "val/loss" in one]


RUNS = [("processes2", name) for name in CASES] + [("resumed1", name) for name in CASES]
RUNS += [("resumed1/sharded", "sft")]  # the strategy in a single process
VALIDATED = {"sft", "kto", "e2e stage 1", "e2e stage 2", "e2e stage 3"}
RUNS += [("resumed4", name) for name, case in CASES.items() if case.four]


@pytest.mark.parametrize(("how", "name"), RUNS)
def test_loss_gradient_and_weights_are_those_of_one_process(how: str, name: str, folder: Path):
    """Under SGD the gradient is what the weights have moved by."""
    one, other = result(folder, "processes1", name), result(folder, how, name)
    assert gap(one["weights"], other["weights"]) < 1e-6
    steps = STEPS if how.startswith("processes") else STEPS - HALF
    there, here = losses(one["logged"])[-steps:], losses(other["logged"])
    assert len(there) == len(here) == steps
    for expected, found in zip(there, here, strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    here = held_out(other["logged"])
    assert bool(here) is (name in VALIDATED)
    for expected, found in zip(held_out(one["logged"])[-len(here) :], here, strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    start = torch.load(folder / "processes2" / name / "half.ckpt", weights_only=True)["state_dict"]
    assert gap({key: start[key] for key in one["weights"]}, one["weights"]) > 1e-4, "nothing was learnt after the half"


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_is_that_of_one_process(name: str, folder: Path):
    """Whole weights and whole optimiser states, under the same names and numbers."""
    one, two = (
        torch.load(folder / how / name / "half.ckpt", weights_only=True) for how in ("processes1", "processes2")
    )
    assert one.keys() == two.keys()
    assert gap(one["state_dict"], two["state_dict"]) < 1e-6
    (here,), (there,) = one["optimizer_states"], two["optimizer_states"]
    assert here["param_groups"] == there["param_groups"]
    assert here["state"].keys() == there["state"].keys() != set()
    for number, state in here["state"].items():
        assert gap(state, there["state"][number]) < 1e-6


def test_clipping_has_an_effect(folder: Path):
    """So that the equality of clipped trainings says something."""
    runs = [
        result(folder, "processes1", name)["weights"] for name in ("dpo", "dpo, unclipped", "dpo, clipped by value")
    ]
    assert min(gap(runs[i], runs[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3


def test_the_guard_hears_the_same_on_unequal_shares(folder: Path):
    """Three sentences: two on one rank, one on the other, none on two of four."""
    one, two, four = (
        [{key: value for key, value in line.items() if key.startswith(("guard", "dev/"))} for line in found["logged"]]
        for found in (result(folder, how, "diffro") for how in ("processes1", "processes2", "resumed4"))
    )
    one, two, four = ([line for line in lines if line] for lines in (one, two, four))
    assert len(one) == len(two) == 2 * (1 + STEPS)
    for expected, found in zip(one, two, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    assert four[-1] == pytest.approx(one[-1], rel=1e-5)


PLACES = ("contrast/desirable", "contrast/undesirable", "")


def test_the_command_fits_the_pair_and_tests_and_exports(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """TKTO from its labels on, then its test, and what other commands make of the run."""
    monkeypatch.chdir(folder)
    for place in PLACES:
        one, two = (checkpoint_weights(folder / "pair" / how / place) for how in ("one", "two"))
        assert all(math.isfinite(float(value.sum())) for value in two.values())
        assert gap(one, two) < 1e-6, place
    heard = [(folder / "pair" / how / "test/utterances.jsonl").read_text() for how in ("one", "two")]
    assert heard[0] == heard[1] != ""
    # Weights that differ in the last bits have another digest, and say the same.
    spoken = [
        [row | {"made_with": ""} for _, row in read_json_lines(folder / f"{how}.jsonl")] for how in ("one", "two")
    ]
    assert spoken[0] == spoken[1] != []
    run(["export", "--config", "pair/two/config.yaml", "--to", "exported"])
    written = load_file(folder / "exported/model.safetensors")
    assert gap({f"policy.{key}": value for key, value in written.items()}, checkpoint_weights(folder / "pair/two")) == 0


def test_all_stages_of_e2e_keep_their_parts(folder: Path):
    for place in ("stage1", "stage2", ""):
        one, two = (checkpoint_weights(folder / "stages" / how / place) for how in ("one", "two"))
        assert gap(one, two) < 1e-6, place
        for path in (folder / "stages/one" / place / "parts").rglob("*.safetensors"):
            other = folder / "stages/two" / path.relative_to(folder / "stages/one")
            assert gap(load_file(path), load_file(other)) < 1e-6, path


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_other_ways_of_sharding_are_refused(strategy: type):
    with pytest.raises(ValueError, match=f"must not be {strategy.__name__}.*use ShardedStrategy"):
        check_strategy(strategy())
    check_strategy(DDPStrategy())
    check_strategy(ShardedStrategy())


def test_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="must not be DeepSpeedStrategy"):
        check_strategy(object.__new__(DeepSpeedStrategy))


def test_weights_stay_in_float32():
    for plugin in (HalfPrecision("bf16-true"), HalfPrecision("16-true"), DoublePrecision()):
        with pytest.raises(ValueError, match=f"must be 32-true or bf16-mixed, got {plugin.precision}"):
            check_precision(plugin)
    scaled = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="got 16-mixed"):
        check_precision(scaled)
    check_precision(Precision())
    check_precision(MixedPrecision("bf16-mixed", "cpu"))


def test_a_time_limit_must_be_above_nothing():
    with pytest.raises(ValueError, match="timeout_minutes must be above 0"):
        ShardedStrategy(timeout_minutes=0.0)


def test_a_model_that_is_whole_is_its_own_copy():
    model = nn.Linear(2, 2)
    assert not is_sharded(model)
    assert plain(model) is model
    with whole(model):
        assert not torch.is_grad_enabled()
    assert share_of(model.bias, model.bias) is model.bias

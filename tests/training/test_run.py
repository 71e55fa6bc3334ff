"""The directory of a run: when it may go on, what it keeps, and that a cut training equals an uncut one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tts_align.training.callbacks.keep_last import KeepLast
from tts_align.training.run import RecipeChanged, Run, RunSettings, differences, finished

RECIPE = {"objective": {"class_path": "DPO", "init_args": {"beta": 0.1}}, "trainer": {"devices": 1, "max_steps": 9}}


def _begin(directory: Path, recipe: dict[str, Any] = RECIPE) -> Run:
    run = Run(directory)
    run.save_recipe(yaml.safe_dump(recipe))
    run.checkpoint.parent.mkdir(parents=True)
    torch.save({"epoch": 1, "global_step": 7, "state_dict": {}}, run.checkpoint)
    return run


def test_same_recipe_goes_on(tmp_path: Path) -> None:
    run = _begin(tmp_path / "a")
    run.check(yaml.safe_dump(RECIPE))
    assert run.progress() == (1, 7)


def test_devices_and_length_may_change(tmp_path: Path) -> None:
    run = _begin(tmp_path / "a")
    longer = {**RECIPE, "trainer": {"devices": 8, "max_steps": 100}, "run": {"threads": 3}}
    run.check(yaml.safe_dump(longer))


def test_another_recipe_is_refused_with_the_keys_and_the_ways_out(tmp_path: Path) -> None:
    run = _begin(tmp_path / "a")
    other = {**RECIPE, "objective": {"class_path": "DPO", "init_args": {"beta": 0.2}}}
    with pytest.raises(RecipeChanged, match=r"objective.init_args.beta: 0.1 there, 0.2 now") as raised:
        run.check(yaml.safe_dump(other))
    assert "--run.directory" in str(raised.value)
    assert "--run.overwrite true" in str(raised.value)


def test_a_recipe_that_learned_nothing_is_no_obstacle(tmp_path: Path) -> None:
    run = Run(tmp_path / "a")
    run.save_recipe(yaml.safe_dump(RECIPE))
    assert not run.begun
    run.check("objective: other")


def test_a_checkpoint_of_an_earlier_stage_counts(tmp_path: Path) -> None:
    run = Run(tmp_path / "a")
    run.save_recipe(yaml.safe_dump(RECIPE))
    (run.directory / "contrast").mkdir()
    torch.save({}, run.directory / "contrast" / "last.ckpt")
    with pytest.raises(RecipeChanged):
        run.check("objective: other")


def test_clear_touches_nothing_else(tmp_path: Path) -> None:
    run = _begin(tmp_path / "a")
    (run.directory / "notes.txt").write_text("mine")
    run.clear()
    assert [path.name for path in run.directory.iterdir()] == ["notes.txt"]
    run.clear()


def test_recipe_is_written_whole(tmp_path: Path) -> None:
    run = Run(tmp_path / "deep" / "a")
    run.save_recipe("a: 1\n")
    run.save_recipe("a: 2\n")
    assert run.recipe.read_text() == "a: 2\n"
    assert [path.name for path in run.directory.iterdir()] == ["config.yaml"]


def test_differences_name_both_values() -> None:
    old = {"data": {"seed": 0, "bins": [1, 2]}, "trainer": {"devices": 1, "precision": None}}
    new = {"data": {"seed": 1, "bins": [1, 2]}, "trainer": {"devices": 2, "precision": None}, "more": {}}
    assert list(differences(old, new)) == [("data.seed", 0, 1), ("more", "(nothing)", {})]


@pytest.mark.parametrize("settings", [{"checkpoint_every": 0}, {"threads": 0}])
def test_settings_are_checked(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        RunSettings(**settings)


@pytest.mark.parametrize(
    ("limits", "epoch", "step", "expected"),
    [
        ({"max_steps": 10}, 0, 9, False),
        ({"max_steps": 10}, 0, 10, True),
        ({"max_epochs": 2}, 1, 99, False),
        ({"max_epochs": 2}, 2, 99, True),
        ({"max_steps": 10, "max_epochs": -1}, 5, 9, False),
        ({"max_time": "00:01:00:00"}, 5, 9, False),
    ],
)
def test_finished(limits: dict[str, Any], epoch: int, step: int, expected: bool, tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path, **limits)
    assert finished(trainer, epoch, step) is expected


class _Loader(DataLoader):
    """Says that it is resumable: what the module learns from is not the rows, but the number of the step."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class _Counting(LightningModule):
    """Each step has its own target, so a step that is left out or repeated shows."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.layer, self.stop_at, self.seen = nn.Linear(2, 1), stop_at, 0
        self.saves: list[int] = []

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        if self.global_step == self.stop_at:
            raise RuntimeError("killed")
        self.seen += 1
        return (self.layer(batch) - self.global_step).pow(2).mean()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.saves.append(checkpoint["global_step"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def _train(path: Path, module: _Counting, every: int, accumulate: int = 1, **fit: Any) -> _Counting:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=10,
        accumulate_grad_batches=accumulate,
        logger=False,
        callbacks=[KeepLast(path, every)],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path.parent,
    )
    trainer.fit(module, _Loader(torch.ones(12, 2), batch_size=1), **fit)
    return module


def test_a_killed_training_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    seed_everything(0)
    whole = _train(tmp_path / "whole.ckpt", _Counting(), every=4)
    seed_everything(0)
    cut = tmp_path / "cut.ckpt"
    with pytest.raises(RuntimeError, match="killed"):
        _train(cut, _Counting(stop_at=6), every=4)
    assert torch.load(cut, weights_only=True)["global_step"] == 4
    continued = _train(cut, _Counting(), every=4, ckpt_path=cut)
    assert continued.seen == 6
    torch.testing.assert_close(continued.state_dict(), whole.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(("every", "accumulate", "saves"), [(4, 1, [4, 8, 10]), (5, 1, [5, 10]), (3, 2, [3, 6, 9, 10])])
def test_checkpoints_come_after_whole_steps_and_at_the_end(
    every: int, accumulate: int, saves: list[int], tmp_path: Path
) -> None:
    assert _train(tmp_path / "last.ckpt", _Counting(), every, accumulate).saves == saves
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]

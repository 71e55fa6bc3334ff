"""Bars and logs of a fit and its test."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from terminal import on_a_terminal
from tiny import Memory, build, make_trainer, save_recipe

from tts_align.evaluation.audio import write_pair
from tts_align.objectives import SFT
from tts_align.training.callbacks import logs
from tts_align.training.callbacks.logs import TrainingLog, test_numbers
from tts_align.training.callbacks.progress import StepBar
from tts_align.training.run import Run

pytestmark = [
    pytest.mark.whole_runs,
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:The number of training batches .*"),
]


@pytest.fixture
def parts(tiny_policy: Path, tiny_rows: str, tmp_path: Path):
    return build(SFT(), tiny_policy, tiny_rows, tmp_path / "cache", validation=tiny_rows, rows_per_step=2)


def test_the_bar_counts_optimiser_steps(parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    module, data = parts
    trainer = make_trainer(tmp_path, StepBar(), max_epochs=2, enable_progress_bar=True)
    trainer.fit(module, datamodule=data)
    out, err = capsys.readouterr()
    steps = trainer.global_step
    assert out == ""
    last = [line for line in err.splitlines() if line.startswith("fit: ")][-1]
    assert f"| {steps}/{steps} [" in last
    assert "epoch=1" in last
    assert "loss=" in last
    assert any(line.startswith("validate: 100%") for line in err.splitlines())


class Record(TrainingLog):
    """Keeps the norms that the training really had."""

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [value.grad.flatten() for value in pl_module.parameters() if value.grad is not None]
        self.norms.append(float(torch.cat(gradients).double().norm()))
        super().on_before_optimizer_step(trainer, pl_module, optimizer)


def test_rate_and_norm_are_logged_with_the_losses(parts, tmp_path: Path):
    module, data = parts
    module.lr_scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    record, memory = Record(), Memory()
    trainer = make_trainer(tmp_path, record, logger=memory, max_steps=4, log_every_n_steps=2, gradient_clip_val=1e-3)
    trainer.fit(module, datamodule=data)
    noted = {step: numbers for step, numbers in memory.logged if "train/gradient_norm" in numbers}
    assert sorted(noted) == [2, 4] == [step for step, numbers in memory.logged if "train/loss" in numbers]
    for step, numbers in noted.items():
        assert numbers["train/gradient_norm"] == pytest.approx(record.norms[step - 1], rel=1e-5)  # not the clipped one
        assert numbers["train/learning_rate"] == pytest.approx(0.1 * 0.5 ** (step - 1))


def test_nothing_is_computed_for_steps_that_are_not_logged(parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module, data = parts
    calls: list[int] = []
    norm = logs.total_norm
    monkeypatch.setattr(logs, "total_norm", lambda *given, **options: calls.append(1) or norm(*given, **options))
    trainer = make_trainer(tmp_path, TrainingLog(), max_steps=4, log_every_n_steps=4)
    trainer.fit(module, datamodule=data)
    assert len(calls) == 1


def test_test_numbers_and_sounds_reach_tensorboard(tmp_path: Path):
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run(tmp_path)
    run.test.mkdir()
    one = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 3}
    summary = {"base": {"cer": one}, "aligned": {"cer": {**one, "value": 0.25}}, "failed": {"base": []}, "seed": 1}
    summary["further"] = {"aligned": {"length": {**one, "value": None}}}
    (run.test / "summary.json").write_text(json.dumps(summary))
    (run.test / "reward.json").write_text(json.dumps({"speaker_accuracy": one}))
    expected = {"test/base/cer": 0.5, "test/aligned/cer": 0.25, "test/speaker_accuracy": 0.5}
    assert dict(test_numbers(run.test)) == expected
    tone = np.sin(np.arange(800) / 5)
    write_pair(run.test / "audio", "p1", {"base": tone, "aligned": tone / 2}, 8000)
    logger = TensorBoardLogger(tmp_path, "", "tensorboard")
    trainer = make_trainer(tmp_path, logger=[logger])
    TrainingLog().on_test_end(trainer)
    logger.finalize("success")
    events = EventAccumulator(str(run.logs))
    events.Reload()
    assert {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]} == expected
    assert set(events.Tags()["audio"]) == {"test/p1-base", "test/p1-aligned"}
    assert events.Audio("test/p1-base")[0].sample_rate == 8000


def test_other_loggers_get_sounds_in_their_own_way(tmp_path: Path):
    class Spoken(Memory):
        def log_audio(self, key, audios, step=None, **kwargs):
            self.logged.append((step, {key: [Path(path).name for path in audios]}))

    run = Run(tmp_path)
    write_pair(run.test / "audio", "p1", {"base": np.zeros(8), "aligned": np.zeros(8)}, 8000)
    logger = Spoken()
    TrainingLog().on_test_end(make_trainer(tmp_path, logger=logger))
    assert (0, {"test/audio": ["p1-aligned.wav", "p1-base.wav"]}) in logger.logged


@pytest.fixture(params=["WandbLogger", "MLFlowLogger"])
def service(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[Any]]:
    """Name of a service's logger, and the loggers that take its place: they keep the numbers."""
    import lightning.pytorch.loggers as loggers

    made: list[Any] = []

    class Kept(Memory):
        """Takes the place of the service's logger."""

        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    name = request.param
    Kept.__module__, Kept.__qualname__, Kept.__name__ = "lightning.pytorch.loggers", name, name
    monkeypatch.setattr(loggers, name, Kept)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return f"lightning.pytorch.loggers.{name}", made


def test_another_logger_is_one_flag_and_tensorboard_stays(
    service: tuple[str, list[Any]], tiny_policy: Path, tiny_rows: str, tmp_path: Path
):
    """``--trainer.logger WandbLogger``."""
    from tts_align.cli.entry import run

    recipe = save_recipe(tmp_path, "sft", tiny_policy, tiny_rows)
    run(["fit", "--config", recipe, "--trainer.logger", service[0]])
    (kept,) = service[1]
    assert any("train/loss" in numbers for _, numbers in kept.logged)
    assert any("train/gradient_norm" in numbers for _, numbers in kept.logged)
    assert list((tmp_path / "run/tensorboard").glob("events*"))


def test_fits_before_the_policys_are_not_mixed_into_its_run_at_a_service(
    service: tuple[str, list[Any]], tiny_policy: Path, tiny_rows: str, tmp_path: Path
):
    """Within a process W&B gives one run to all its loggers: the steps of both sides of the pair would stand in it."""
    from tts_align.cli.entry import run

    recipe = save_recipe(tmp_path, "tkto", tiny_policy, tiny_rows, model__contrast={"class_path": "Contrast"})
    cli = run(["fit", "--config", recipe, "--trainer.logger", service[0]])
    (kept,) = service[1]
    steps = [step for step, numbers in kept.logged if "train/loss" in numbers]
    assert len(steps) == len(set(steps)) == cli.trainer.global_step
    for side in ("desirable", "undesirable"):
        assert list((tmp_path / "run/contrast" / side / "tensorboard").glob("events*"))


@pytest.mark.filterwarnings("ignore")  # its own
def test_mlflow_itself_gets_the_numbers(
    tiny_policy: Path, tiny_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As recipes/README.md has it."""
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    from tts_align.cli.entry import run

    monkeypatch.chdir(tmp_path)
    recipe = save_recipe(tmp_path, "tkto", tiny_policy, tiny_rows, model__contrast={"class_path": "Contrast"})
    uri = "sqlite:///mlflow.db"
    cli = run(["fit", "--config", recipe, "--trainer.logger", "MLFlowLogger", "--trainer.logger.tracking_uri", uri])
    client = mlflow.MlflowClient(uri)
    (kept,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert kept.info.status == "FINISHED"
    losses = client.get_metric_history(kept.info.run_id, "train/loss")
    assert len(losses) == cli.trainer.global_step


def test_weights_and_biases_itself_gets_the_numbers(
    tiny_policy: Path, tiny_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    from tts_align.cli.entry import run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    recipe = save_recipe(tmp_path, "tkto", tiny_policy, tiny_rows, model__contrast={"class_path": "Contrast"})
    cli = run(["fit", "--config", recipe, "--trainer.logger", "WandbLogger"])
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert summary["trainer/global_step"] <= cli.trainer.global_step
    assert {"train/loss", "train/gradient_norm"} <= set(summary)
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminal")
def test_on_a_terminal_the_table_starts_on_its_own_line(tmp_path: Path):
    code = (
        "from tts_align.cli.entry import run\n"
        "run('fit --config sft --config models/symbolic --trainer.max_steps 2 --data.max_rows 40 --run.threads 1 "
        "--model.test.sentences 2 --data.validation null --model.test.speakers [sakura]'.split())\n"
    )
    lines = on_a_terminal(code, tmp_path)
    header = next(number for number, line in enumerate(lines) if line.split() == ["base", "aligned", "difference"])
    assert lines[header - 2].startswith("test: 100%")
    assert any(line.startswith("fit: 100%") for line in lines[:header])
    assert not any("%|" in line for line in lines[header:])

# SPDX-License-Identifier: Apache-2.0
"""What the loggers hold besides losses: learning rate, gradient norm, test metrics, and sound before and after."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor
from torch.optim import Optimizer

from tts_align.training.gradients import average_gradients, total_norm
from tts_align.training.run import REWARD_NUMBERS, SUMMARY, Run
from tts_align.training.sharding import ShardedStrategy
from tts_align.utils.readers import read_json_object


class TrainingLog(Callback):
    """Logs learning rate and gradient norm with the losses, and the numbers and sounds of a test at its end.

    The norm is that before clipping. It is computed in the steps that are logged only, and read with their losses, so
    that no step waits for the device because of it.
    """

    def __init__(self) -> None:
        self._noted: dict[str, Tensor | float] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note the numbers of a step that is going to be logged."""
        if not trainer.loggers or (trainer.global_step + 1) % _every(trainer):
            return
        if isinstance(trainer.strategy, ShardedStrategy):  # callbacks have their turn before the module
            average_gradients(pl_module.parameters())
        gradients = [
            value.grad for group in optimizer.param_groups for value in group["params"] if value.grad is not None
        ]
        self._noted = {"train/gradient_norm": total_norm(gradients)} if gradients else {}
        for number, group in enumerate(optimizer.param_groups):
            self._noted[f"train/learning_rate{f'/{number}' if number else ''}"] = float(group["lr"])

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Log what was noted, in the step in which losses are logged, too."""
        noted, self._noted = self._noted, {}
        if noted:
            _log(trainer, {name: float(value) for name, value in noted.items()}, trainer.global_step)

    def on_test_end(self, trainer: Trainer, *_: Any) -> None:
        """Log the numbers and sounds that the test has written."""
        run = Run(trainer.default_root_dir)
        if not trainer.is_global_zero or not trainer.loggers:
            return
        step = trainer.global_step or (run.progress()[1] if run.checkpoint.exists() else 0)
        _log(trainer, dict(test_numbers(run.test)), step)
        for logger in trainer.loggers:
            _log_sounds(logger, run.test / "audio", step)


def continue_logs(loggers: Iterable[Logger], step: int) -> None:
    """Let TensorBoard forget what a killed run has logged after the checkpoint that is resumed from.

    Args:
        loggers: of the training; nothing has been logged with them yet.
        step: of the checkpoint.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger._kwargs["purge_step"] = step + 1


def test_numbers(folder: Path) -> Iterator[tuple[str, float]]:
    """Name and value of every number in the results of a test.

    Args:
        folder: ``test`` of a run.
    """
    for name in (SUMMARY, REWARD_NUMBERS):
        path = folder / name
        if path.is_file():
            yield from _values(read_json_object(path), "test")


test_numbers.__test__ = False  # type: ignore[attr-defined]  # not a test, whatever its name


def _values(node: Mapping[str, Any], name: str) -> Iterator[tuple[str, float]]:
    """``{"aligned": {"cer": {"value": 0.1}}}`` -> ``test/aligned/cer``, 0.1."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            if isinstance(value.get("value"), (int, float)):
                yield f"{name}/{key}", float(value["value"])
            else:
                yield from _values(value, f"{name}/{key}")


def _every(trainer: Trainer) -> int:
    return int(trainer.log_every_n_steps)  # type: ignore[attr-defined]


def _log(trainer: Trainer, numbers: Mapping[str, float], step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(dict(numbers), step=step)


_MOST_SOUNDS = 32
"""A test may keep thousands; a logger is shown the first."""


def _log_sounds(logger: Logger, folder: Path, step: int) -> None:
    """Sounds for loggers that take them: TensorBoard's, and Weights & Biases'."""
    files = sorted(folder.glob("*.wav"))[:_MOST_SOUNDS]
    if isinstance(logger, TensorBoardLogger):
        import soundfile

        for path in files:
            sound, rate = soundfile.read(path, dtype="float32")
            logger.experiment.add_audio(f"test/{path.stem}", torch.from_numpy(sound)[None], step, sample_rate=rate)
    elif files and hasattr(logger, "log_audio"):
        logger.log_audio("test/audio", [str(path) for path in files], step, caption=[path.stem for path in files])

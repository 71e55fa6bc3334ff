# SPDX-License-Identifier: Apache-2.0
"""Progress of fits and tests, drawn with the one kind of bar that every command has."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from tts_align.utils.progress import Bar, bar


class StepBar(ProgressBar):
    """A bar of the training's optimiser steps, and one for each pass over held-out rows or test sentences."""

    def __init__(self) -> None:
        super().__init__()
        self._training: Bar | None = None
        self._passing: Bar | None = None

    def disable(self) -> None:
        """Called by Lightning in every process but the first: bars there are not drawn anyway."""

    def _bar(self, trainer: Trainer, total: int | float, done: int, what: str, unit: str, leave: bool = True) -> Bar:
        finite = int(total) if math.isfinite(total) and total >= 0 else None
        return bar(finite, done, what, trainer.global_rank, unit, leave)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the whole training, from where it resumes."""
        steps = trainer.estimated_stepping_batches
        self._training = self._bar(trainer, steps, trainer.global_step, "fit", "step")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Count finished optimiser steps; the loss is shown as it was last logged."""
        shown, done = self._training, trainer.global_step
        if shown is None or done == shown.n:
            return
        numbers = {"epoch": trainer.current_epoch, **trainer.progress_bar_metrics}
        shown.set_postfix(numbers, refresh=False)
        shown.advance(done - shown.n)

    def on_train_end(self, *_: Any) -> None:
        """End its line."""
        self._end_training()

    def on_exception(self, *_: Any) -> None:
        """What is said about the exception starts on a line of its own."""
        self._end_passing()
        self._end_training()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show a pass over the held-out rows."""
        total = sum(trainer.num_val_batches)
        self._passing = self._bar(trainer, total, 0, "validate", "batch", leave=self._training is None)

    def on_validation_batch_end(self, *_: Any) -> None:
        """Count it."""
        self._advance()

    def on_validation_end(self, *_: Any) -> None:
        """End its line."""
        self._end_passing()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show a pass over the test sentences."""
        self._passing = self._bar(trainer, sum(trainer.num_test_batches), 0, "test", "batch")

    def on_test_batch_end(self, *_: Any) -> None:
        """Count it."""
        self._advance()

    def on_test_epoch_end(self, *_: Any) -> None:
        """End its line before the table is printed."""
        self._end_passing()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show a pass over held-out rows; work that is no pass over batches has a bar of its own."""
        total = sum(trainer.num_predict_batches)
        if total > 1:
            self._passing = self._bar(trainer, total, 0, "predict", "batch")

    def on_predict_batch_end(self, *_: Any) -> None:
        """Count it."""
        self._advance()

    def on_predict_end(self, *_: Any) -> None:
        """End its line."""
        self._end_passing()

    def _advance(self) -> None:
        if self._passing is not None:
            self._passing.advance(1)

    def _end_training(self) -> None:
        if self._training is not None:
            self._training.close()
        self._training = None

    def _end_passing(self) -> None:
        if self._passing is not None:
            self._passing.close()
        self._passing = None

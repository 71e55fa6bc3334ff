# SPDX-License-Identifier: Apache-2.0
"""When a training is saved, and how it ends when it is asked to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from tts_align.training.callbacks.watched import is_watched
from tts_align.training.finite import FiniteGuard
from tts_align.utils import agreement, signals
from tts_align.utils.distributed import gathered


class KeepLast(Checkpoint):
    """Keeps the newest state of a training in one file, written atomically, and the one before it.

    Nothing is saved on an exception: the state may then stand in the middle of a step, and continuing from it would not
    be what an undisturbed training does. A signal ends the training after the step, which is saved.

    Args:
        path: file of the checkpoint.
        every: optimiser steps between two checkpoints; the end of the training is always saved.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every
        self.saved = self._step = 0
        self._waiting = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the training starts, which need not be saved again."""
        self.saved = self._step = trainer.global_step
        self._waiting = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save every ``every`` steps, and when a signal came, on the first batch that ends a step."""
        step, self._step = self._step, trainer.global_step
        if step == trainer.global_step:
            return
        stops = stop_is_agreed(trainer)
        if not stops and trainer.global_step // self.every == self.saved // self.every:
            return
        if _validation_follows(trainer):  # a run resumed from here would leave it out
            self._waiting = True
            return
        self._save(trainer)
        if stops:
            signals.stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what had to wait for a validation."""
        if self._waiting and trainer.state.fn == TrainerFn.FITTING:
            self._waiting = False
            self._save(trainer)
            if stop_is_agreed(trainer, always=True):
                signals.stop()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end; an epoch that ``max_steps`` cut short is not over for a run that continues with more."""
        if trainer.global_step > self.saved:
            with _open_epoch(trainer):
                self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        for one in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(one, FiniteGuard):
                one.check(trainer)
        module: object = trainer.lightning_module
        if is_watched(module):  # so that what is logged in this step is not noted any more
            module.log_when_due()
        trainer.save_checkpoint(self.path)
        self.saved = trainer.global_step


@contextmanager
def _open_epoch(trainer: Trainer) -> Iterator[None]:
    """Within the block an epoch of which batches are left counts as begun, as it does inside it, not as finished."""
    epochs: Any = trainer.fit_loop.epoch_progress
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress
    cut = int(epochs.current.processed > 0 and batches.current.processed < trainer.num_training_batches)
    finished = [(counts, name) for counts in (epochs.current, epochs.total) for name in ("processed", "completed")]
    for counts, name in finished:
        setattr(counts, name, getattr(counts, name) - cut)
    try:
        yield
    finally:
        for counts, name in finished:
            setattr(counts, name, getattr(counts, name) + cut)


def _validation_follows(trainer: Trainer) -> bool:
    """Whether this batch is followed by a validation."""
    loop = trainer.fit_loop.epoch_loop
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and sum(trainer.num_val_batches) > 0 and bool(loop._should_check_val_fx(fetcher))


def stop_is_agreed(trainer: Trainer, always: bool = False) -> bool:
    """Whether a signal asks this training to stop; the same in all processes, whichever of them it reached.

    Several processes agree only in steps that are logged, when they wait for each other anyway.

    Args:
        trainer: of the training.
        always: agree now; every process must do so.
    """
    if trainer.world_size == 1:
        return bool(signals.asked())
    if not always and trainer.global_step % int(trainer.log_every_n_steps):  # type: ignore[attr-defined]
        return False
    number = max(gathered(signals.asked()))
    signals.ask(number)
    return bool(number)


class StopOnSignal(Callback):
    """Ends what trains, speaks, scores or validates after a batch, if the process was asked to end."""

    def __init__(self) -> None:
        self._begun = False

    def _begin(self) -> None:
        if not self._begun:
            signals.begin()
        self._begun = True

    def _end(self) -> None:
        if self._begun:
            signals.end()
        self._begun = False

    def on_train_start(self, *_: Any) -> None:
        """From now on steps are finished."""
        self._begin()

    def on_test_start(self, *_: Any) -> None:
        """From now on batches are finished."""
        self._begin()

    def on_predict_start(self, *_: Any) -> None:
        """From now on batches are finished."""
        self._begin()

    def on_train_end(self, *_: Any) -> None:
        """All are."""
        self._end()

    def on_test_end(self, *_: Any) -> None:
        """All are."""
        self._end()

    def on_predict_end(self, *_: Any) -> None:
        """All are."""
        self._end()

    def on_exception(self, *_: Any) -> None:
        """Nothing is finished any more."""
        self._end()

    def on_test_batch_end(self, *_: Any) -> None:
        """A batch was tested."""
        signals.check()

    def on_predict_batch_end(self, *_: Any) -> None:
        """A batch was scored."""
        signals.check()

    def on_test_epoch_end(self, *_: Any) -> None:
        """All processes have tested their batches, or one was asked to end: then nothing is gathered."""
        agreement.barrier()

    def on_predict_epoch_end(self, *_: Any) -> None:
        """Likewise for scores."""
        agreement.barrier()

    def on_validation_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        """Likewise for a validation outside of a training."""
        if trainer.state.fn != TrainerFn.FITTING:
            agreement.barrier()

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """A batch was validated; amid a training the validation is finished first."""
        if trainer.state.fn != TrainerFn.FITTING:
            signals.check()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """A training that keeps no checkpoint has nothing to lose."""
        if not any(isinstance(one, KeepLast) for one in trainer.callbacks):  # type: ignore[attr-defined]
            signals.check()

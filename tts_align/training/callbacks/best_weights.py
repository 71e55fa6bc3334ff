# SPDX-License-Identifier: Apache-2.0
"""The weights a policy was heard best with, kept in one file of the run until better ones are found."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer

from tts_align.training.run import CHECKPOINTS


class BestWeights:
    """Weights of the best step so far, in ``checkpoints/best-STEP.ckpt`` of the run's directory."""

    def __init__(self) -> None:
        self.step: int | None = None
        self._referenced: int | None = None
        self._before: int | None = None

    def keep(self, trainer: Trainer) -> None:
        """Save the present weights as the best; called in every process."""
        # The run's last checkpoint may still refer to the file that was the best when it was written.
        # So may the checkpoint before it, which is used when the last one is damaged.
        referenced, before, self.step = self._referenced, self._before, trainer.global_step
        alone = trainer.strategy.lightning_restore_optimizer  # a sharded strategy loads all or nothing
        trainer.save_checkpoint(self._path(trainer, self.step), weights_only=alone)
        self._referenced, self._before = referenced, before
        self._remove_others(trainer, (self.step, referenced, before))

    def restore(self, trainer: Trainer) -> Path | None:
        """Give the module the best weights; returns where they were, or ``None`` if it has them.

        Raises:
            FileNotFoundError: somebody removed the file.
        """
        if self.step is None or self.step == trainer.global_step:
            return None
        path = self._path(trainer, self.step)
        if not path.exists():
            raise FileNotFoundError(f"no checkpoint at {path}, but the weights of step {self.step} were the best heard")
        saved = trainer.strategy.load_checkpoint(path, weights_only=True)
        trainer.strategy.load_model_state_dict(saved, strict=False)
        return path

    def clean(self, trainer: Trainer) -> None:
        """Remove all but the best, at the end."""
        self._remove_others(trainer, (self.step,))

    def to_state(self) -> int | None:
        """What a checkpoint refers to."""
        self._before, self._referenced = self._referenced, self.step
        return self.step

    def from_state(self, step: int | None) -> None:
        """Continue from a checkpoint."""
        self.step = self._referenced = self._before = step

    @staticmethod
    def _path(trainer: Trainer, step: int) -> Path:
        return Path(trainer.default_root_dir, CHECKPOINTS, f"best-{step}.ckpt")

    def _remove_others(self, trainer: Trainer, steps: Sequence[int | None]) -> None:
        kept = {self._path(trainer, step) for step in steps if step is not None}
        if not trainer.is_global_zero or not kept:
            return
        for path in Path(trainer.default_root_dir, CHECKPOINTS).glob("best-*.ckpt"):
            if path not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

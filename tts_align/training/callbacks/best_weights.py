# SPDX-License-Identifier: Apache-2.0
"""Weights that a policy was heard with, kept in files of the run for as long as anything refers to them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from tts_align.training.callbacks.keep_last import KeepLast
from tts_align.training.run import CHECKPOINTS
from tts_align.utils.distributed import gathered
from tts_align.utils.files import directory_written_atomically, written_atomically
from tts_align.utils.readers import ReadError, load_tensors


class KeptWeights:
    """Weights of some steps, in ``checkpoints/NAME-STEP.ckpt`` of the run's directory.

    A checkpoint of the run tells which of them a callback needs when it continues from there: its state holds the step,
    or a list of steps, under the name. A file is removed only when no checkpoint refers to it any more.

    Args:
        name: begins the name of the files.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def path(self, trainer: Trainer, step: int) -> Path:
        """File of the weights of a step."""
        return Path(trainer.default_root_dir, CHECKPOINTS, f"{self.name}-{step}.ckpt")

    def save(self, trainer: Trainer, step: int) -> Path:
        """Save the present weights; called in every process."""
        path = self.path(trainer, step)
        alone = trainer.strategy.lightning_restore_optimizer  # a strategy that does not, loads all or nothing
        trainer.save_checkpoint(path, weights_only=alone)
        return path

    def adopt(self, trainer: Trainer, steps: Collection[int]) -> None:
        """Have the files of these steps in this run, which may continue one in another directory; in every process.

        Raises:
            FileNotFoundError: neither this directory nor that of the checkpoint holds one of them.
        """
        missing = ""
        if trainer.is_global_zero:
            missing = next(filter(None, (self._bring(trainer, step) for step in steps)), "")
        if missing := trainer.strategy.broadcast(missing):
            raise FileNotFoundError(missing)

    def _bring(self, trainer: Trainer, step: int) -> str:
        """Copy one file from where the run continues; returns what to do if it is nowhere."""
        own, source = self.path(trainer, step), Path(str(trainer.ckpt_path or "")).absolute().parent
        if own.exists():
            return ""
        for folder in (source, source / CHECKPOINTS, source.parent / CHECKPOINTS):
            if (folder / own.name).exists():
                own.parent.mkdir(parents=True, exist_ok=True)
                _copy(folder / own.name, own)
                return ""
        return (
            f"{trainer.ckpt_path} refers to the weights of step {step}, but there is no {own}: put the file {own.name} "
            "beside the checkpoint, or start anew"
        )

    def load(self, trainer: Trainer, step: int) -> dict[str, Any]:
        """What is in the file of a step, in every process; from the first one where they share no disk.

        Raises:
            FileNotFoundError: somebody removed the file.
        """
        path = self.path(trainer, step)
        there = gathered(path.exists())
        if not there[0]:
            raise FileNotFoundError(f"no checkpoint at {path}, but the weights of step {step} were the best heard")
        if all(there):
            return dict(trainer.strategy.load_checkpoint(path, weights_only=True))
        own = trainer.strategy.load_checkpoint(path, weights_only=True) if trainer.is_global_zero else {}
        return dict(trainer.strategy.broadcast(own))

    def remove_others(self, trainer: Trainer, steps: Collection[int]) -> None:
        """Remove the files that neither the caller nor a checkpoint of the run needs.

        Args:
            trainer: of the run.
            steps: whose files the caller needs.
        """
        if not trainer.is_global_zero:
            return
        pattern = re.compile(rf"{re.escape(self.name)}-(\d+)\.ckpt")
        folder = Path(trainer.default_root_dir, CHECKPOINTS)
        files = {path: int(found[1]) for path in folder.glob("*.ckpt") if (found := pattern.fullmatch(path.name))}
        doomed = [path for path, step in files.items() if step not in steps]
        if not doomed or (needed := self._referenced(trainer, set(files))) is None:
            return
        for path in doomed:
            if files[path] not in needed:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _referenced(self, trainer: Trainer, own: set[Path]) -> set[int] | None:
        """Steps that the run's checkpoints refer to; ``None`` if one of them cannot be read."""
        run = Path(trainer.default_root_dir)
        folders = {run, run / CHECKPOINTS}
        for callback in trainer.checkpoint_callbacks:
            if folder := getattr(callback, "dirpath", None):
                folders.add(Path(folder))
        steps: set[int] = set()
        for path in {path.resolve() for folder in folders for path in folder.glob("*.ckpt")}:
            if path in {one.resolve() for one in own}:
                continue
            states = callback_states(path)
            if states is None:
                return None
            for state in states.values():
                value = state.get(self.name) if isinstance(state, dict) else None
                steps |= {value} if type(value) is int else set(value) if isinstance(value, list) else set()
        return steps


def callback_states(path: Path) -> dict[str, Any] | None:
    """What callbacks keep in a checkpoint; nothing in one of weights alone, ``None`` if it cannot be read."""
    file = path / "meta.pt" if path.is_dir() else path
    try:
        saved = load_tensors(file)
    except (ReadError, OSError):  # of another library, or damaged: what cannot be read may refer to anything
        return None
    states = saved.get("callbacks", {}) if isinstance(saved, dict) else None
    return states if isinstance(states, dict) else None


def _copy(source: Path, target: Path) -> None:
    """Copy a checkpoint, which may be a directory; the copy appears whole or not at all."""
    if source.is_dir():
        with directory_written_atomically(target) as scratch:
            shutil.copytree(source, scratch, dirs_exist_ok=True)
    else:
        with written_atomically(target) as scratch:
            shutil.copyfile(source, scratch)


class BestWeights(KeptWeights):
    """Weights of the best step so far.

    Args:
        name: begins the name of the file; a callback's state holds the step under it.
    """

    def __init__(self, name: str = "best") -> None:
        super().__init__(name)
        self.step: int | None = None

    def keep(self, trainer: Trainer) -> Path:
        """Save the present weights as the best; called in every process."""
        self.step = trainer.global_step
        path = self.save(trainer, self.step)
        self.remove_others(trainer, (self.step,))
        return path

    def continue_here(self, trainer: Trainer) -> None:
        """Have the file of the best weights in this run's directory; see :meth:`KeptWeights.adopt`."""
        if self.step is not None:
            self.adopt(trainer, (self.step,))

    def restore(self, trainer: Trainer) -> Path | None:
        """Give the module the best weights; returns where they were, or ``None`` if it has them.

        Raises:
            FileNotFoundError: somebody removed the file.
        """
        if self.step is None or self.step == trainer.global_step:
            return None
        trainer.strategy.load_model_state_dict(self.load(trainer, self.step), strict=False)
        save_again(trainer)
        return self.path(trainer, self.step)

    def clean(self, trainer: Trainer) -> None:
        """Remove all but the best, and what a checkpoint of the run still refers to."""
        if self.step is not None:
            self.remove_others(trainer, (self.step,))

    def to_state(self) -> int | None:
        """What a checkpoint refers to."""
        return self.step

    def from_state(self, step: int | None) -> None:
        """Continue from a checkpoint."""
        self.step = step


def save_again(trainer: Trainer) -> None:
    """Let the run's last checkpoint be written at the end, although it has been at this step: something has changed."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, KeepLast):
            callback.saved = -1


def refuse_minimum(trainer: Trainer, who: str) -> None:
    """Raise ``ValueError`` if Lightning would train on after somebody stops the training.

    Args:
        trainer: whose settings they are.
        who: stops it.
    """
    if trainer.min_steps or trainer.min_epochs:
        raise ValueError(
            f"{who} cannot stop a training before trainer.min_steps or trainer.min_epochs: leave both out, or let it "
            "only warn (stop: false)"
        )

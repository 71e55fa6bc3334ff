# SPDX-License-Identifier: Apache-2.0
"""The directory of a run: its recipe, its checkpoints, its logs, and how it resumes."""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from tts_align.training.checkpoint import LAST, PREVIOUS, read_checkpoint, whole_checkpoint
from tts_align.training.finite import OnNotFinite
from tts_align.utils.files import check_links, remove_leftovers, written_atomically
from tts_align.utils.locks import LOCK, locked
from tts_align.utils.messages import first_process, say
from tts_align.utils.readers import ReadError, load_yaml, read_json_object, read_yaml

RECIPE, CHECKPOINTS, LOGS, TEST = "config.yaml", "checkpoints", "tensorboard", "test"
DAMAGED = "damaged"
"""Name of a checkpoint that could not be read, beside the others, until the next one is."""
EXPORT = "export.json"
CHOICE = "chosen.json"
"""In the folder of checkpoints: which of them was heard best."""
SUMMARY, REWARD_NUMBERS = "summary.json", "reward.json"
"""What a test writes about a policy, and about a reward model."""
ENTRIES = (RECIPE, CHECKPOINTS, LOGS, TEST, EXPORT, "cache", "contrast", "reward", "model", "stage1", "stage2", "parts")
"""What a run leaves in its directory, and ``run.overwrite`` removes."""

IRRELEVANT = (
    "run.*",
    "trainer.accelerator",
    "trainer.strategy*",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.logger*",
    "trainer.fast_dev_run",
    "trainer.max_*",
    "trainer.limit_val_batches",
    "trainer.limit_test_batches",
    "trainer.limit_predict_batches",
    "trainer.val_check_interval",
    "trainer.check_val_every_n_epoch",
    "trainer.num_sanity_val_steps",
    "trainer.log_every_n_steps",
    "trainer.enable_*",
    "trainer.inference_mode",
    "trainer.profiler*",
    "trainer.detect_anomaly",
    "trainer.barebones",
    "trainer.default_root_dir",
    "trainer.model_registry",
    "model.vocoder*",
    "model.judge*",
    "model.sampling*",
    "model.test*",
    "model.cache",
    "data.validation",
    "data.num_workers",
)
"""Keys that do not change what is learned per step: a run may continue with other values, and for longer."""


class RecipeChanged(ValueError):
    """The directory holds the run of another recipe."""


@dataclass
class RunSettings:
    """Where a run lives and how it resumes.

    Args:
        directory: folder of the run: saved recipe, checkpoints, logs and test results; ``runs/<name of the first
            recipe>`` by default.
        overwrite: whether to remove what an earlier run left in the folder and start anew.
        checkpoint_every: optimiser steps between two checkpoints, from which a run resumes.
        test_after_fit: whether to test as soon as the training ends.
        on_not_finite: reaction to a NaN or infinite loss or gradient: stop, with step and rows named, or skip the step,
            for which every step waits for the device.
        threads: CPU threads of each process; PyTorch decides by default.
        modules: names of your own modules, imported before the recipe is read, so that their objectives are known by
            their names; in the working folder or installed.
    """

    directory: str | None = None
    overwrite: bool = False
    checkpoint_every: int = 100
    test_after_fit: bool = True
    on_not_finite: OnNotFinite = "stop"
    threads: int | None = None
    modules: str | tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.directory is not None and not self.directory.strip():
            raise ValueError("run.directory is empty: name a folder, or leave it out for runs/<name of the recipe>")
        if self.checkpoint_every < 1:
            raise ValueError(f"run.checkpoint_every must be at least 1, got {self.checkpoint_every}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"run.threads must be at least 1, got {self.threads}")


class Run:
    """The directory of one run.

    Args:
        directory: where it is; need not exist.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.recipe = self.directory / RECIPE
        self.checkpoint = self.directory / CHECKPOINTS / LAST
        self.choice = self.directory / CHECKPOINTS / CHOICE
        self.logs = self.directory / LOGS
        self.test = self.directory / TEST

    @property
    def begun(self) -> bool:
        """Whether something was learned here that another recipe must not continue from."""
        return self.recipe.is_file() and next(self.directory.rglob("*.ckpt"), None) is not None

    @property
    def chosen(self) -> Path:
        """The checkpoint that was heard best, which ``test`` and the others use; the last one if none was chosen.

        One that is damaged is named, and the last one used instead.

        Raises:
            FileNotFoundError: somebody removed it.
        """
        if not self.choice.is_file():
            return self.newest() or self.checkpoint
        path = self.choice.with_name(Path(str(read_json_object(self.choice).get("file"))).name)
        if not path.exists():
            raise FileNotFoundError(
                f"no checkpoint at {path}, which {self.choice} says was heard best: put it back, or remove "
                f"{self.choice.name} to use {self.checkpoint.name}"
            )
        try:
            return whole_checkpoint(path)
        except ReadError as error:
            if (last := self.newest()) is None:
                raise
            say(f"{error}\nit was heard best; the last checkpoint is used instead: {last}")
            return last

    def stopped(self) -> str:
        """Why a guard has stopped the run for good, by its last checkpoint; empty if none has."""
        if not self.checkpoint.is_file():
            return ""
        states = read_checkpoint(self.checkpoint).get("callbacks", {}).values()
        return next((str(one["stopped"]) for one in states if isinstance(one, dict) and one.get("stopped")), "")

    def check(self, recipe: str) -> None:
        """Raise :class:`RecipeChanged` if the directory holds a begun run of another recipe than this YAML text."""
        if not self.begun:
            return
        changed = list(differences(read_yaml(self.recipe), load_yaml(recipe)))
        if changed:
            raise RecipeChanged(
                f"{self.directory} holds a run of another recipe:\n"
                + "".join(f"  {key}: {old!r} there, {new!r} now\n" for key, old, new in changed)
                + "choose another --run.directory, or drop the earlier run with --run.overwrite true"
            )

    def clear(self) -> None:
        """Remove what an earlier run left; nothing else in the directory is touched."""
        for name in ENTRIES:
            path = self.directory / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    @contextmanager
    def claimed(self, command: str) -> Iterator[None]:
        """Within the block no other command writes to the directory; what killed ones left unfinished is removed.

        Args:
            command: that writes there.

        Raises:
            LockedError: another one is at work.
            ValueError: a link in the directory leads out of it.
        """
        with locked(self.directory / LOCK, self.directory, command, "run.directory"):
            for name in ENTRIES:
                check_links(self.directory / name, self.directory)
            if removed := remove_leftovers(self.directory, deep=True):
                say(f"{self.directory}: removed {len(removed)} unfinished files of a killed run")
            yield

    def newest(self) -> Path | None:
        """The last checkpoint or, if that is damaged, which is said, the one before it; ``None`` if there is none.

        Raises:
            ReadError: there are some, and all are damaged.
        """
        damaged: ReadError | None = None
        for path in (self.checkpoint, self.checkpoint.with_name(PREVIOUS)):
            try:
                found = whole_checkpoint(path)
            except FileNotFoundError:
                continue
            except ReadError as error:
                damaged = damaged or error
                continue
            if damaged is not None:
                say(f"{damaged}\nthe checkpoint before it is used: {path}")
            return found
        if damaged is not None:
            raise ReadError(
                damaged.where, f"{damaged.what}; there is no whole one beside it: begin anew with --run.overwrite true"
            )
        return None

    def begin(self, recipe: str, anew: bool, given: Path | None = None) -> Path | None:
        """Make the directory that of a recipe's run, and give the checkpoint to continue from, if there is one.

        Args:
            recipe: as YAML, in full.
            anew: drop what an earlier run has left.
            given: checkpoint to continue from instead of the run's last one.

        Raises:
            RecipeChanged: the directory holds the run of another recipe.
            ReadError: the given checkpoint is damaged.
            ValueError: the given checkpoint would take the place of the run's own, or be removed with it.
        """
        if not anew:
            self.check(recipe)
        if given is not None:
            self._check_given(whole_checkpoint(given), anew)
        if first_process():
            if anew:
                self.clear()
            self.save_recipe(recipe)
        return given or (None if anew else self.newest())

    def _check_given(self, given: Path, anew: bool) -> None:
        if anew and given.resolve().is_relative_to(self.directory.resolve()):
            raise ValueError(f"--ckpt_path {given} lies in {self.directory}, which --run.overwrite would clear")
        if not anew and self.checkpoint.exists() and not self.checkpoint.samefile(given):
            raise ValueError(
                f"{self.directory} has a checkpoint of its own, whose place a training from --ckpt_path {given} would "
                "take: choose another --run.directory, or drop the earlier run with --run.overwrite true"
            )

    def continued(self, checkpoint: Path, trainer: Trainer) -> str:
        """Say from where a training resumes, or that nothing is left to train; gives the checkpoint's path."""
        self.set_aside(checkpoint)
        epoch, step = self.progress(checkpoint)
        if finished(trainer, epoch, step):
            say(f"{self.directory} is finished: {step} {'step' if step == 1 else 'steps'}; nothing left to train")
        else:
            say(f"continuing {self.directory} from step {step}")
        return str(checkpoint)

    def set_aside(self, used: Path) -> None:
        """Give a damaged last checkpoint another name, so that it never takes the place of the one that is used."""
        if self.checkpoint.is_file() and not self.checkpoint.samefile(used) and first_process():
            os.replace(self.checkpoint, self.checkpoint.with_name(DAMAGED))

    def save_recipe(self, recipe: str) -> None:
        """Write the recipe, all of it or nothing."""
        with written_atomically(self.recipe) as scratch:
            scratch.write_text(recipe, "utf-8")

    def progress(self, checkpoint: Path | None = None) -> tuple[int, int]:
        """Finished epochs and optimiser steps in a checkpoint, the last by default; zeros when it is sharded."""
        path = checkpoint or self.checkpoint
        if path.is_dir():
            return 0, 0
        saved = read_checkpoint(path)
        return int(saved["epoch"]), int(saved["global_step"])


def differences(old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Keys whose values differ between two recipes, with both values; ``"(nothing)"`` where one lacks the key.

    >>> list(differences({"a": {"b": 1, "c": 2}, "run": {"threads": 1}}, {"a": {"b": 3, "c": 2}}))
    [('a.b', 1, 3)]
    """
    for key, *values in changed(old, new):
        if not any(fnmatch.fnmatchcase(key, pattern) for pattern in IRRELEVANT):
            yield key, *values


def changed(old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """The same for every key, whether or not it changes what is learned."""
    before, after = dict(_flat(old)), dict(_flat(new))
    for key in sorted(before.keys() | after.keys()):
        values = before.get(key, "(nothing)"), after.get(key, "(nothing)")
        if values[0] != values[1]:
            yield key, *values


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a recipe by dotted key."""
    if not isinstance(node, dict) or not node:
        yield prefix, node
        return
    for key, value in node.items():
        yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))


def finished(trainer: Trainer, epoch: int, step: int) -> bool:
    """Whether a training that got this far has nothing left to do."""
    by_epochs = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epoch
    return by_epochs or 0 <= trainer.max_steps <= step


def how_to_test(run: Run, has_judge: bool) -> str:
    """The command that compares before and after, for a run whose recipe has no test sentences.

    Args:
        run: that was trained.
        has_judge: whether its recipe names a judge.
    """
    judge = "" if has_judge else " --model.judge WhisperJudge --model.judge.model FOLDER --model.judge.language CODE"
    return (
        "not tested:   the recipe names no test sentences; for a before and after, give some that were not trained on"
        f"{'' if has_judge else ', and a recogniser'}:\n"
        f"  tts-align test --config {run.directory / RECIPE} --model.test.prompts sentences.txt{judge}"
    )


def where(run: Run, say: Callable[[str], None]) -> None:
    """Say where things are."""
    entries = {
        "recipe": run.recipe,
        "checkpoint": run.checkpoint,
        "logs": run.logs,
        "test results": run.test,
    }
    found = [f"{name + ':':14}{path}" for name, path in entries.items() if path.exists()]
    say("\n" + "\n".join(found))

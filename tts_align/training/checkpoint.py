# SPDX-License-Identifier: Apache-2.0
"""What of a module a checkpoint holds, which checkpoints a module takes, and how they are read."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor, nn

from tts_align.objectives.base import Part
from tts_align.utils.files import scratch_beside, written_atomically
from tts_align.utils.readers import ReadError, check_archive, load_tensors

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
"""Names of a run's newest checkpoint, and of the one before it."""


def trained_state(module: nn.Module, state: Mapping[str, Tensor], trains: Collection[Part]) -> dict[str, Tensor]:
    """Keep what trains, and the buffers of models that train; the rest is rebuilt from its own path.

    Args:
        module: whose state it is.
        state: all of it, whole or sharded.
        trains: the parts that train besides the policy.
    """
    trained = {name for name, value in module.named_parameters() if value.requires_grad}
    prefixes = ("policy.", "objective.", *(f"parts.{part}." for part in trains))
    buffers = {name for name, _ in module.named_buffers() if name.startswith(prefixes)}
    return {key: value for key, value in state.items() if key in trained | buffers}


def check_fits(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` for a state that lacks what trains in the module, or holds numbers that are none."""
    trained = {name: value.shape for name, value in module.named_parameters() if value.requires_grad}
    saved = {name: value.shape for name, value in state.items()}
    wrong = sorted(name for name, shape in trained.items() if saved.get(name) != shape)
    if wrong:
        raise ValueError(
            f"the checkpoint does not fit {len(wrong)} of {len(trained)} trained weights, {wrong[0]} first (there "
            f"{tuple(saved.get(wrong[0], ()))}, here {tuple(trained[wrong[0]])}): it was made with another "
            "model.policy"
        )
    check_finite(state, "the checkpoint")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds, on the CPU, its tensors mapped from the file.

    Raises:
        FileNotFoundError: there is none.
        ReadError: it is damaged, or no checkpoint of a training.
    """
    saved = load_tensors(path)
    names = saved if isinstance(saved, dict) else {}
    if lacking := [name for name in ("state_dict", "epoch", "global_step") if name not in names]:
        raise ReadError(path, f"is no checkpoint of a training: it lacks {', '.join(lacking)}")
    if not isinstance(saved["state_dict"], dict) or not all(isinstance(name, str) for name in saved["state_dict"]):
        raise ReadError(path, "is no checkpoint of a training: expected weights by name under state_dict")
    if odd := [name for name in ("epoch", "global_step") if type(saved[name]) is not int or saved[name] < 0]:
        raise ReadError(path, f"is no checkpoint of a training: {odd[0]} is {saved[odd[0]]!r:.60}")
    return saved


def check_finite(state: Mapping[str, Any], what: str | Path) -> None:
    """Refuse weights that are not finite numbers.

    Args:
        state: tensors by name; anything else is not looked at.
        what: holds them, for the message.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    wrong = [name for name, value in state.items() if isinstance(value, Tensor) and not _finite(value)]
    if wrong:
        raise ValueError(
            f"{what}: {len(wrong)} of {len(state)} weights hold numbers that are not finite, {wrong[0]} first: the "
            "training that made them has diverged; take an earlier checkpoint, or train again with a lower learning "
            "rate"
        )


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


def whole_checkpoint(path: Path) -> Path:
    """The path of a checkpoint if every byte of it is what was written; one in several files is not looked into.

    Raises:
        FileNotFoundError: there is none.
        ReadError: it is damaged.
    """
    if not path.is_dir():
        read_checkpoint(path)
        check_archive(path, contents=True)
    return path


class CheckpointFiles(CheckpointIO):
    """Writes checkpoints beside their final place, waits for the disk, and puts them there in one step.

    The last checkpoint becomes the previous one only when the next is complete: at no moment is there none. Nothing
    goes through a folder for temporary files.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        path = Path(path)
        with written_atomically(path) as scratch:
            with scratch.open("wb") as file:
                _write(checkpoint, file)
            if path.name == LAST and path.is_file():
                _keep(path, path.with_name(PREVIOUS))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; code in it is never run."""
        return read_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint."""
        Path(path).unlink(missing_ok=True)


def _write(checkpoint: dict[str, Any], file: Any) -> None:
    """``torch.save``, but for what the operating system says of a full disk, which PyTorch hides behind its own."""
    sink = _Sink(file)
    try:
        torch.save(checkpoint, cast("Any", sink))
    except RuntimeError:
        if sink.error is None:
            raise
        raise sink.error from None


class _Sink:
    """A file that remembers why it could not be written."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _keep(path: Path, name: Path) -> None:
    """Give a file a second name, in the place of what has that name; where that is impossible, its only one."""
    scratch = scratch_beside(name)
    try:
        os.link(path, scratch)
    except OSError:  # a file system without links
        os.replace(path, name)
        return
    os.replace(scratch, name)

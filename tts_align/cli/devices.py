# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a recipe's devices is said in the recipe's words, not in Lightning's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tts_align.cli.errors import RecipeError, did_you_mean
from tts_align.cli.shelf import overlays

_GPU = ("gpu", "cuda")
_VARIANTS = ("spawn", "fork", "notebook", "find_unused", "single", "stage", "offload", "xla")
"""Parts of the names of strategies that are variants of others, or of other devices: known, but not listed."""


@contextmanager
def of_the_trainer(given: Mapping[str, Any]) -> Iterator[None]:
    """What Lightning refuses while it builds a trainer is said of the option that is to be changed.

    Args:
        given: options of the trainer.

    Raises:
        RecipeError: with the option, what was expected, and what came.
    """
    accumulated = given.get("accumulate_grad_batches")
    if accumulated is not None and accumulated < 1:
        raise RecipeError(f"trainer.accumulate_grad_batches must be at least 1, got {accumulated}")
    if given.get("barebones"):
        raise RecipeError(
            "trainer.barebones cannot be: without checkpoints and callbacks a run could neither resume nor end well; "
            "to time the bare steps set trainer.logger false, trainer.enable_checkpointing false, "
            "trainer.enable_progress_bar false and trainer.limit_val_batches 0"
        )
    try:
        yield
    except (ImportError, TypeError, ValueError, RuntimeError, MisconfigurationException) as error:
        if not _is_lightnings(error) or (isinstance(error, RuntimeError) and "SLURM" not in str(error)):
            raise
        raise RecipeError(_said(given, " ".join(str(error).split()))) from error


def _is_lightnings(error: BaseException) -> bool:
    """Whether Lightning raised the error, not a class of ours or of the user's that it calls."""
    trace, module = error.__traceback__, ""
    while trace is not None:
        module, trace = trace.tb_frame.f_globals.get("__name__", ""), trace.tb_next
    return module.partition(".")[0] == "lightning"


def _said(given: Mapping[str, Any], text: str) -> str:
    """What is to be changed, by what Lightning says."""
    strategy, accelerator, devices = (given.get(name) for name in ("strategy", "accelerator", "devices"))
    if isinstance(strategy, str) and strategy not in ("auto", *(known := StrategyRegistry.available_strategies())):
        return _no_strategy(strategy, known)
    if isinstance(accelerator, str):
        kinds = ["auto", "gpu", *sorted(AcceleratorRegistry.available_accelerators())]
        if accelerator not in kinds:
            near = did_you_mean(accelerator, kinds)
            return f"trainer.accelerator: expected one of {', '.join(kinds)}, got {accelerator}{near}"
        if (why := _missing(accelerator)) is not None:
            return f"trainer.accelerator: expected a device that PyTorch finds here, got {accelerator}: {why}"
    if "SLURM" in text:
        return f"trainer: {text} In a shell of an allocation, `export SLURM_JOB_NAME=bash` lets one process start alone"
    if "num_nodes" in text:
        return f"trainer.num_nodes: expected a number of machines above 0, got {given.get('num_nodes')}"
    if any(word in text for word in ("devices", "Device", "gpu", "GPUs", "invalid literal")) and "strategy" not in text:
        there = f"; PyTorch finds {torch.cuda.device_count()} GPUs here" if torch.cuda.is_available() else ""
        return f"trainer.devices: expected a number above 0, a list such as [0, 1], or auto, got {devices}{there}"
    return f"trainer: {text.replace('`', '')}"


def _no_strategy(strategy: str, known: list[str]) -> str:
    plain = ["auto", *(name for name in known if not any(part in name for part in _VARIANTS))]
    packaged = " or ".join(f"--config {name}" for name in overlays() if name.startswith("strategy/"))
    return (
        f"trainer.strategy: expected one of {', '.join(plain)}, or a class such as ShardedStrategy, got {strategy}"
        f"{did_you_mean(strategy, known)}\n  packaged overlays set strategy and devices together: {packaged}"
    )


def _missing(accelerator: str) -> str | None:
    """Why there is no device of a kind; ``None`` where there is one."""
    if accelerator == "auto" or (accelerator == "gpu" and torch.backends.mps.is_available()):
        return None
    try:
        if AcceleratorRegistry.get("cuda" if accelerator in _GPU else accelerator).is_available():
            return None
    except ImportError:  # of a TPU's library
        pass
    if accelerator not in _GPU:
        return "there is none; set auto, cpu or gpu"
    build = f"PyTorch {torch.__version__} is built without CUDA" if torch.version.cuda is None else "PyTorch sees none"
    return (
        f"{build}; set trainer.accelerator to cpu or auto, or install a PyTorch for your GPU "
        "and look whether nvidia-smi and CUDA_VISIBLE_DEVICES show one"
    )

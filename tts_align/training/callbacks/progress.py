# SPDX-License-Identifier: Apache-2.0
"""Progress bars: rate and time left, drawn live in a terminal and line by line into a file."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar


def _without_version(metrics: dict[str, Any]) -> dict[str, Any]:
    """Drop the logger's version, which says nothing here: a run's directory is its name."""
    return {name: value for name, value in metrics.items() if name != "v_num"}


class LiveBar(RichProgressBar):
    """For a terminal."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands behind the bar."""
        return _without_version(super().get_metrics(trainer, pl_module))


class PlainBar(TQDMProgressBar):
    """For a file or a pipe, into which a live bar would draw nothing before its end."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands behind the bar."""
        return _without_version(super().get_metrics(trainer, pl_module))


def progress_bar() -> ProgressBar:
    """The bar that suits where the output goes."""
    return LiveBar() if sys.stdout.isatty() else PlainBar(refresh_rate=10)

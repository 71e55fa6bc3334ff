# SPDX-License-Identifier: Apache-2.0
"""What a run says, once for all its processes, and what it keeps to itself."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from tts_align.utils.progress import above_bars

TALKERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
    "lightning.fabric.utilities.seed",
    "lightning.fabric.utilities.distributed",
)
SMALL_TALK = (
    "GPU available:",
    "TPU available:",
    "\N{ELECTRIC LIGHT BULB} Tip:",
    "Seed set to",
    "`weights_only` was not set",
    "Initializing distributed:",
    "Restoring states from",
    "Restored all states from",
    "Loaded model weights from",
    "`Trainer.fit` stopped:",
)
"""What Lightning's messages say that help nobody here."""

MEANT = (
    r"Found \d+ module\(s\) in eval mode",  # frozen parts
    r"The number of training batches .* is smaller than the logging interval",  # the end of a training is logged too
    r"You have overridden `transfer_batch_to_device` in `LightningModule`",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # between Lightning 2.6 and PyTorch 2.11
)
"""Warnings about what is meant to be so, or is not ours to mend."""


LIGHTNING = "lightning.fabric.utilities.rank_zero"
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Where launchers say a process's number, in the order in which Lightning looks."""


def first_process() -> bool:
    """Whether this is the only process, or the one of those that speaks and writes.

    Lightning knows once it is there. Commands that train nothing need not wait seconds for its import to be told.
    """
    told = getattr(getattr(sys.modules.get(LIGHTNING), "rank_zero_only", None), "rank", None)
    if told is not None:
        return bool(told == 0)
    return next((os.environ[name] == "0" for name in RANKS if name in os.environ), True)


def say(text: str) -> None:
    """Print once, however many processes there are, on lines of its own."""
    if first_process():
        with above_bars():
            print(text, flush=True)


class _AboveBars(logging.StreamHandler):
    """Messages on lines of their own."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message."""
        with above_bars(self.stream):
            super().emit(record)


def quiet() -> None:
    """Keep Lightning's small talk away from what a run has to say; its warnings, and our messages, stay."""
    for name in TALKERS:
        logging.getLogger(name).addFilter(_worth_saying)
    for message in MEANT:
        warnings.filterwarnings("ignore", message=message)
    ours = logging.getLogger("tts_align")
    if not ours.handlers:
        ours.addHandler(_AboveBars())
    ours.setLevel(logging.INFO if first_process() else logging.WARNING)


def _worth_saying(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return record.levelno > logging.INFO or not any(phrase in message for phrase in SMALL_TALK)

# SPDX-License-Identifier: Apache-2.0
"""Rows without a label in a manifest that labels others: nobody has said whether they are good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from tts_align.batch import Reads
from tts_align.data.records import Row
from tts_align.data.table.columns import NONE
from tts_align.data.table.rows import RowTable

Unlabelled = Literal["stop", "desirable", "drop"]


def settle_unlabelled(rows: Sequence[Row], reads: Reads, rule: Unlabelled, paired_only: bool = False) -> RowTable:
    """The rows that may be used, now that it is settled what those without a label are.

    It matters where some rows are labelled and others are not, and where what has no label would count as good speech.
    A manifest without any label holds recordings, which are good speech; pairs and labelled rows are used as they are.

    Args:
        rows: of one manifest.
        reads: which of them the objective uses.
        rule: refuse the manifest, count them as desirable, or leave them out.
        paired_only: whether only rows in pairs are used.

    Raises:
        ValueError: the rule is stop, and it matters.
    """
    table = rows if isinstance(rows, RowTable) else RowTable.of(rows)
    label, loose = table.array("label"), (table.array("label") == NONE) & ~table.array("pair").astype(bool)
    labelled = int((label != NONE).sum())
    matters = loose.any() and labelled and reads in (Reads.SPEECH, Reads.ANY) and not paired_only
    if not matters or rule == "desirable":
        return table
    if rule == "drop":
        return table.take(np.flatnonzero(~loose))
    raise ValueError(
        f"{int(loose.sum())} rows have no label, {table[int(loose.argmax())].id!r} first, and {labelled} have one; "
        "unlabelled rows would count as good speech. Label them, or say what they are: data.unlabelled: desirable, or "
        "drop"
    )

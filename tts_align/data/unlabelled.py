# SPDX-License-Identifier: Apache-2.0
"""Rows without a label in a manifest that labels others: nobody has said whether they are good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from tts_align.batch import Reads
from tts_align.data.records import Row

Unlabelled = Literal["stop", "desirable", "drop"]


def settle_unlabelled(
    rows: Sequence[Row], reads: Reads, rule: Unlabelled, paired_only: bool = False
) -> tuple[Row, ...]:
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
    loose = [row for row in rows if row.desirable is None and row.pair is None]
    labelled = sum(row.desirable is not None for row in rows)
    matters = loose and labelled and reads in (Reads.SPEECH, Reads.ANY) and not paired_only
    if not matters or rule == "desirable":
        return tuple(rows)
    if rule == "drop":
        return tuple(row for row in rows if row.desirable is not None or row.pair is not None)
    raise ValueError(
        f"{len(loose)} rows have no label, {loose[0].id!r} first, and {labelled} have one; unlabelled rows would count "
        "as good speech. Label them, or say what they are: data.unlabelled: desirable, or drop"
    )

# SPDX-License-Identifier: Apache-2.0
"""Error counts: pure functions of strings."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from kaldialign import edit_distance

BAD_CER = 0.3
"""An utterance with a higher character error rate is a bad case."""


def normalise(text: str) -> str:
    """What characters are counted: NFKC, lower case, without punctuation, symbols and spaces.

    Example:
        >>> normalise("カレーは、とても ﾂﾗｲ！")
        'カレーはとてもツライ'
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(character for character in folded if unicodedata.category(character)[0] not in "PSZC")


def character_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """Fewest edits that turn the reference into the hypothesis, and the reference's length, in normalised characters.

    Example:
        >>> character_errors("なべわからい", "なべつらい、よ")
        (3, 6)
    """
    expected, heard = normalise(reference), normalise(hypothesis)
    counts: dict[str, Any] = edit_distance(list(expected), list(heard))
    return int(counts["total"]), len(expected)


def cer(reference: str, hypothesis: str) -> float:
    """Character error rate of one utterance: edits over the reference's length; may exceed 1.

    Example:
        >>> cer("かな", "かに")
        0.5
    """
    errors, length = character_errors(reference, hypothesis)
    return errors / max(length, 1)


def nearest_cer(references: Sequence[str], hypothesis: str) -> float:
    """Character error rate against the nearest of several references."""
    if not references:
        raise ValueError("expected at least one transcript to compare with, got none")
    return min(cer(reference, hypothesis) for reference in references)

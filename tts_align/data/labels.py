# SPDX-License-Identifier: Apache-2.0
"""Thumbs as people write them: ``true``, ``1``, ``up``, ``good``, ``👍``, or a number of stars; one reader for all."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

MOST_STARS = 5
NEEDS_STARS = "looks like a number of stars"
"""Part of the fault of a label that means nothing until it is known from how many stars on a row is desirable."""

_WORDS: Mapping[str, bool] = {
    **dict.fromkeys(("true", "1", "1.0", "up", "good", "yes", "desirable", "thumbs up", "\N{THUMBS UP SIGN}"), True),
    **dict.fromkeys(("false", "0", "0.0", "down", "bad", "no", "undesirable", "thumbs down"), False),
    "\N{THUMBS DOWN SIGN}": False,
}
_STARS = re.compile(r"(\N{BLACK STAR}+)\N{WHITE STAR}*|(\d(?:\.\d+)?)(?: ?/ ?5| stars?)?")


def read_label(value: object, desirable_stars: float | None = None) -> bool | None:
    """Whether a row is desirable; ``None`` without a label.

    Upper and lower case are the same. Without ``desirable_stars`` the numbers 1 and 0 are thumbs; with it every number
    is one of 1 to 5 stars.

    Args:
        value: what the file holds: a truth value, a number, or words.
        desirable_stars: number of stars from which on a row is desirable, above 1 and at most 5.

    Raises:
        ValueError: the value says neither, or could mean both.

    Example:
        >>> read_label("Up"), read_label(0), read_label("4/5", 4.0), read_label("★★☆☆☆", desirable_stars=4.0)
        (True, False, True, False)
    """
    if desirable_stars is not None and not 1 < desirable_stars <= MOST_STARS:
        raise ValueError(f"desirable_stars must lie above 1 and at most at {MOST_STARS}, got {desirable_stars:g}")
    if value is None or isinstance(value, bool) or (isinstance(value, float) and math.isnan(value)):
        return value if isinstance(value, bool) else None
    word = value.strip().casefold().removesuffix("\N{VARIATION SELECTOR-16}") if isinstance(value, str) else ""
    stars = stars_of(value)
    if stars is not None and desirable_stars is not None:
        if not 1 <= stars <= MOST_STARS:
            raise ValueError(
                f"label: expected 1 to {MOST_STARS} stars, because desirable_stars is set, got {value!r:.60}"
            )
        return stars >= desirable_stars
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    if word in _WORDS:
        return _WORDS[word]
    if stars is not None:
        raise ValueError(
            f"label: {value!r:.60} {NEEDS_STARS}: say from how many on a row is desirable (desirable_stars, such as 4)"
        )
    raise ValueError(
        f"label: expected true or false, 1 or 0, up or down, good or bad, desirable or undesirable, or stars, "
        f"got {value!r:.60}"
    )


def stars_of(value: object) -> float | None:
    """Number of stars that a label gives: 4, "4", "4/5", "4 stars" or "★★★★☆"; ``None`` if it gives no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if not isinstance(value, str):
        if isinstance(value, int):
            return float(max(-(2**63), min(value, 2**63)))  # of whole numbers a float holds no more than some
        return None if math.isnan(value) else value
    found = _STARS.fullmatch(value.strip().casefold())
    if found is None:
        return None
    return float(len(found[1])) if found[1] else float(found[2])

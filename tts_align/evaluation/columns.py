# SPDX-License-Identifier: Apache-2.0
"""Whether columns of a row of candidates or scored utterances hold what they should, and how a fault is said."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

_NAMES = {str: "text", int: "a whole number", bool: "true or false", float: "a number"}


def wrong_types(row: Mapping[str, Any], types: Mapping[str, tuple[type, ...]], nullable: bool = False) -> Iterator[str]:
    """A phrase for each column that holds something else than it should.

    Args:
        row: the columns.
        types: what each column holds; the last is named in the phrase. Columns that the row has not are no fault.
        nullable: whether ``null`` is as good as a column that is not there.

    >>> list(wrong_types({"cer": "0.1", "audio": None}, {"cer": (int, float), "audio": (str,)}, nullable=True))
    ["cer: expected a number, got '0.1'"]
    """
    for name, kinds in types.items():
        if name not in row or (nullable and row[name] is None):
            continue
        value = row[name]
        if not (type(value) in kinds or (str in kinds and isinstance(value, str))):
            yield f"{name}: expected {_NAMES[kinds[-1]]}, got {value!r:.60}"
        elif float in kinds and not is_number(value, finite=False):
            yield f"{name}: expected a number that a float can hold, got one of {len(str(abs(value)))} digits"


def is_number(value: Any, finite: bool = True) -> bool:
    """Whether this is a number; true and false are none, and neither is a whole number that no float can hold.

    Args:
        value: anything.
        finite: whether infinity and NaN count as none.
    """
    if type(value) is float and not finite:
        return True
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def are_numbers(given: Any, finite: bool = True) -> bool:
    """Whether this is a mapping to numbers; see :func:`is_number`."""
    return isinstance(given, Mapping) and all(is_number(one, finite) for one in given.values())

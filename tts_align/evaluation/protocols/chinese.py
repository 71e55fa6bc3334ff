# SPDX-License-Identifier: Apache-2.0
"""Traditional characters to simplified ones, by OpenCC."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tts_align.evaluation.protocols.base import MissingExtra


def simplified(text: str) -> str:
    """Characters simplified one by one (OpenCC's ``t2s``); anything else stays.

    The official scripts use zhconv's ``zh-cn``, which is under the GPL and also exchanges some regional words.

    Raises:
        MissingExtra: OpenCC is not installed.
    """
    return str(converter().convert(text))


@lru_cache(maxsize=1)
def converter() -> Any:
    """The converter; made once.

    Raises:
        MissingExtra: OpenCC is not installed.
    """
    try:
        from opencc import OpenCC
    except ImportError:
        raise MissingExtra("OpenCC", "turning traditional Chinese characters into simplified ones", "zh") from None
    return OpenCC("t2s")

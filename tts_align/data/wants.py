# SPDX-License-Identifier: Apache-2.0
"""What the data look at in the module that trains on them."""

from __future__ import annotations

from typing import Protocol, TypeGuard, runtime_checkable

from tts_align.batch import RowsWanted
from tts_align.models.base.policy import CodecLM
from tts_align.models.base.tokenizer import TokenizerHead


@runtime_checkable
class WantsRows(Protocol):
    """A module that says what its objective wants of the data."""

    policy: CodecLM

    @property
    def rows_wanted(self) -> RowsWanted:
        """What the data must bring."""

    @property
    def trained_tokenizer(self) -> TokenizerHead | None:
        """Makes the speech tokens, if that is part of the training."""


def wants_rows(module: object) -> TypeGuard[WantsRows]:
    """Whether a module says what its objective wants.

    ``isinstance`` has not seen the parts of a module, such as ``policy``, since Python 3.12.
    """
    return all(hasattr(module, name) for name in ("policy", "rows_wanted", "trained_tokenizer"))

# SPDX-License-Identifier: Apache-2.0
"""Where the speech tokens of rows are among the targets, for models that read speech tokens without the policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from tts_align.models.base.layout import Layout, TokenRow


def code_places(rows: Sequence[TokenRow], layout: Layout) -> dict[str, Any]:
    """What :class:`tts_align.batch.Utterances` holds of the rows' speech tokens and their places.

    Args:
        rows: as the policy scores them.
        layout: how they are arranged.
    """
    speech_tokens = [torch.tensor(row.speech) for row in rows]
    lengths = torch.tensor([len(row) for row in speech_tokens])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    targets = [layout.arrange(row).target for row in rows]
    flat = torch.tensor([target for row in targets for target in row])
    return {
        "speech": pad_sequence(speech_tokens, batch_first=True),
        "mask": mask,
        "code_target": (flat < layout.codebook_size).nonzero()[:, 0],
        "code_place": mask.flatten().nonzero()[:, 0],  # :: (b, s) -> (b * s) -> (k)
        "targets": tuple(map(len, targets)),
    }

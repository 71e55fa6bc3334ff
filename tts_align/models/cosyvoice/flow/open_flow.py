# SPDX-License-Identifier: Apache-2.0
"""The flow of a CosyVoice directory, for recipes that train through it."""

from __future__ import annotations

from tts_align.models.cosyvoice.directory import ModelDirectory, load_state
from tts_align.models.cosyvoice.flow.model import load_flow
from tts_align.models.flow.token_flow import TokenFlow


def open_flow(directory: str, weights: str = "flow.pt") -> TokenFlow:
    """The flow of a CosyVoice2 or Fun-CosyVoice3 directory, in training mode: a function that a recipe can name.

    Args:
        directory: as downloaded.
        weights: file of the flow in it.
    """
    source = ModelDirectory.find(directory)
    return load_flow(source.family, load_state(source.file(weights)), source.config).train()

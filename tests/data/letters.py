# SPDX-License-Identifier: Apache-2.0
"""A policy that only knows letters, and rows to feed it."""

from typing import Any

import numpy as np

from tts_align.data.records import Row
from tts_align.models.base.generation import Context, Encoded
from tts_align.models.base.layout import Layout
from tts_align.models.base.policy import CodecLM


class Letters(CodecLM):
    """One text token per letter, the voice's initial in front; it cannot score or speak."""

    def __init__(self) -> None:
        super().__init__()
        self.layout = Layout("cosyvoice2", codebook_size=50)

    def encode_text(self, text: str, context: Context = Context()) -> Encoded:  # noqa: B008
        voice = context.speaker[:1]
        return Encoded(tuple(map(ord, voice + text)), len(voice))

    def _never(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    forward = generate = rebuild = without_adapter = save = digest = _never
    adapted = property(_never)


def make_rows(count: int, sentences: int, seed: int = 0) -> list[Row]:
    """Labelled rows with different speech, several of each sentence, in two voices."""
    generator = np.random.default_rng(seed)
    return [
        Row(
            id=f"u{i}",
            text=f"say {i % sentences}",
            speaker="ab"[i // sentences % 2],
            speech=(i % 50, i // 50, *generator.integers(0, 50, generator.integers(3, 30)).tolist()),
            desirable=bool(generator.random() < 0.6),
        )
        for i in range(count)
    ]

# SPDX-License-Identifier: Apache-2.0
"""Numbers of the published models' own code on tiny random weights, where they are at hand."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

import pytest
from places import SHARED
from safetensors.torch import load_file
from torch import Tensor

from tts_align.models.base.layout import Layout, TokenRow
from tts_align.models.policy.qwen2 import Qwen2CodecLM, Sizes

FOLDER = SHARED / "reference" / "cosyvoice" / "parity"


@dataclass(frozen=True)
class Parity:
    """One dump.

    Args:
        name: its folder.
        io: inputs and outputs.
        layout: that of the model, if it is a language model.
    """

    name: str
    io: dict[str, Tensor]
    layout: Layout

    def rows(self, bistream: bool = False, speech: str = "speech_token") -> list[TokenRow]:
        """The inputs; bistream where there is enough speech, if wanted."""

        def cut(name: str, i: int) -> tuple[int, ...]:
            if f"in.{name}" not in self.io:
                return ()
            return tuple(self.io[f"in.{name}"][i, : self.io[f"in.{name}_len"][i]].tolist())

        rows = []
        for i in range(len(self.io["in.text_token"])):
            prefix = cut("instruct_token", i)
            row = TokenRow((*prefix, *cut("text_token", i)), cut(speech, i), len(prefix))
            rows.append(TokenRow(row.text, row.speech, row.prefix, bistream=bistream and self.layout.can_bistream(row)))
        return rows

    def model(self) -> Qwen2CodecLM:
        """Our model with the dump's weights."""
        sizes = Sizes(
            self.layout.codebook_size,
            text_vocabulary=160,
            family=self.layout.family,
            hidden_size=64,
            layers=2,
            heads=4,
            key_value_heads=2,
            intermediate_size=128,
        )
        model = Qwen2CodecLM(sizes=sizes)
        state = load_file(FOLDER / self.name / "state_dict.safetensors")
        del state["llm.model.lm_head.weight"]  # the text vocabulary's head, which speech does not use
        model.load_state_dict({key.replace("llm.model.model.", "backbone."): value for key, value in state.items()})
        return model.eval()


def as_exact_as(ours: Tensor, published: Tensor, exact: Tensor, bound: float = 5e-6) -> None:
    """Processors round single precision in orders of their own: ours may err twice as far as the stored values did.

    Args:
        ours: what is tested.
        published: the stored values.
        exact: computed in double precision.
        bound: below which the stored values err, as a share of the largest number: that they are the same formula.
    """
    scale = exact.abs().max()
    theirs = (published - exact).abs().max() / scale
    assert theirs < bound
    assert (ours - exact).abs().max() / scale <= 2 * theirs + 1e-7


@functools.cache
def parity(name: str) -> Parity:
    """Read a dump, or skip the test."""
    if not (FOLDER / name).is_dir():
        pytest.skip(f"the dumps of the published code are not here ({FOLDER / name})")
    family = "cosyvoice3" if name.endswith("v3") else "cosyvoice2"
    config = json.loads((FOLDER / name / "config.json").read_text())
    layout = Layout(family, config.get("speech_token_size", 61))
    return Parity(name, load_file(FOLDER / name / "io.safetensors"), layout)

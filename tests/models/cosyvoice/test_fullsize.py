# SPDX-License-Identifier: Apache-2.0
"""At their published sizes our models have the names, shapes and numbers of the published files, in no memory."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from parity import FOLDER
from tiny_directory import FAMILIES, make_directory
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tts_align.models.cosyvoice.directory import load_state
from tts_align.models.cosyvoice.flow.model import UNetFlow, UNetFlowSizes
from tts_align.models.cosyvoice.hift.config import HiFTSizes
from tts_align.models.cosyvoice.hift.model import HiFT
from tts_align.models.cosyvoice.lm import backbone_names, published_names
from tts_align.models.flow.dit import DiTFlow, DiTFlowSizes
from tts_align.models.policy.qwen2 import Qwen2CodecLM, Sizes


def build(name: str) -> nn.Module:
    """A model of published size."""
    kind, version = name.split("_")
    family = f"cosyvoice{version[1]}"
    if kind == "llm":
        sizes = Sizes(
            codebook_size=6561,
            text_vocabulary=151936,
            family=family,
            hidden_size=896,
            layers=24,
            heads=14,
            key_value_heads=2,
            intermediate_size=4864,
        )
        return Qwen2CodecLM(sizes=sizes)
    if kind == "hift":
        return HiFT(HiFTSizes(family=family))
    return UNetFlow(UNetFlowSizes()) if family == "cosyvoice2" else DiTFlow(DiTFlowSizes())


def state_of(name: str, model: nn.Module) -> dict[str, Tensor]:
    """Its weights under the published names."""
    return published_names(model.state_dict()) if name.startswith("llm") else model.state_dict()


@pytest.fixture(scope="module")
def published() -> dict[str, dict[str, list[int]]]:
    if not FOLDER.is_dir():
        pytest.skip(f"the dumps of the published code are not here ({FOLDER})")
    return json.loads((FOLDER / "fullsize_keys.json").read_text())


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("llm_v2", 505_803_812, 295),
        ("llm_v3", 506_148_480, 293),
        ("flow_v2", 112_549_360, 1121),
        ("flow_v3", 332_257_088, 330),
        ("hift_v2", 20_821_295, 328),
        ("hift_v3", 20_779_887, 328),
    ],
)
def test_names_shapes_and_counts(name: str, parameters: int, tensors: int, published: dict[str, dict[str, list[int]]]):
    with FakeTensorMode():  # shapes and types only
        model = build(name)
        state = state_of(name, model)
    assert {key: list(value.shape) for key, value in state.items()} == published[name]
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert len(state) == tensors
    assert sum(value.numel() for value in model.parameters()) == parameters


@pytest.mark.parametrize("name", ["llm_v2", "llm_v3"])
def test_published_names_there_and_back(name: str):
    with FakeTensorMode():
        model = build(name)
        state = published_names(model.state_dict())
        back = backbone_names(state)
    assert {key: value.shape for key, value in back.items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    assert state["llm.model.lm_head.weight"] is state["llm.model.model.embed_tokens.weight"]


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_directories_are_of_the_same_making(
    family: str, tmp_path: Path, published: dict[str, dict[str, list[int]]]
):
    """What other tests take for a download has the names, numbers aside, and the ranks of what is downloaded."""
    path = make_directory(tmp_path / "model", family)
    for kind in ("llm", "flow", "hift"):
        state = load_state(path / f"{kind}.pt")
        ours = {(re.sub(r"\d+", "#", key), value.ndim) for key, value in state.items()}
        theirs = {(re.sub(r"\d+", "#", key), len(shape)) for key, shape in published[f"{kind}_v{family[-1]}"].items()}
        assert ours == theirs

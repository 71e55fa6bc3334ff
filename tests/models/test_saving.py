# SPDX-License-Identifier: Apache-2.0
"""Model directories: whoever is killed while one is replaced leaves the old model or the new one, never a part."""

import json
from pathlib import Path

import pytest
import torch
from killed import Killed, killed_at
from safetensors.torch import load_file
from tiny_sound import FSQ, REWARD

from tts_align.evaluation.judges.ctc import KanaRecogniser, RecogniserSizes
from tts_align.models.codec.mel import CodecSizes, MelCodec
from tts_align.models.codec.mel_fsq import MelFSQ
from tts_align.models.policy.qwen2 import Qwen2CodecLM, Sizes
from tts_align.models.reward.model import RewardModel
from tts_align.utils import files

POLICY = Sizes(5, text_vocabulary=7, hidden_size=8, layers=1, heads=2, key_value_heads=1, intermediate_size=8)
CODEC = CodecSizes(("ann",), mel_channels=6, levels=(3,), encoder_channels=4, encoder_blocks=1, decoder_channels=4)
MODELS = {
    "policy": lambda: Qwen2CodecLM(sizes=POLICY),
    "reward": lambda: RewardModel(sizes=REWARD),
    "tokenizer": lambda: MelFSQ(sizes=FSQ),
    "codec": lambda: MelCodec(CODEC),
    "recogniser": lambda: KanaRecogniser(RecogniserSizes("あい", hidden_channels=4, blocks=1)),
}


def content(directory: Path) -> tuple[dict, dict[str, list[float]]]:
    weights = load_file(directory / "model.safetensors")
    sizes = json.loads((directory / "config.json").read_text("utf-8"))
    return sizes, {name: value.flatten().tolist() for name, value in weights.items()}


def complete(directory: Path) -> bool:
    return all((directory / name).is_file() for name in ("config.json", "model.safetensors"))


def can_swap(folder: Path) -> bool:
    pair = folder / "one", folder / "other"
    for path in pair:
        path.mkdir()
    return files._swapped(*pair)


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_kill_leaves_the_old_model_or_the_new_one(tmp_path, monkeypatch, name, swaps):
    """At every step; where the file system cannot swap two directories, the old one may be beside its place."""
    if not swaps:
        monkeypatch.setattr(files, "_swapped", lambda one, other: False)
    elif not can_swap(tmp_path):
        pytest.skip("this file system cannot swap two directories")
    torch.manual_seed(0)
    old, new, last = MODELS[name](), MODELS[name](), False
    for step in range(20):
        directory = tmp_path / str(step) / "model"
        old.save(directory)
        before = content(directory)
        try:
            with killed_at(step):
                new.save(directory)
            last = True
        except Killed:
            pass
        beside = [] if swaps else list(directory.parent.glob(".model.*.old"))
        whole = [content(place) for place in (directory, *beside) if complete(place)]
        new.save(directory.with_name("expected"))
        assert before in whole or whole == [content(directory.with_name("expected"))], step
        if last:
            assert content(directory) != before
            assert {one.name for one in directory.parent.iterdir()} == {"model", "expected"}
            return
    pytest.fail("it never ends")


@pytest.mark.parametrize("name", MODELS)
def test_a_directory_with_other_files_is_not_replaced(tmp_path, name):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt, which is not part of a model: choose another directory"):
        MODELS[name]().save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", MODELS)
def test_files_of_a_model_can_be_read_by_others(tmp_path, name):
    MODELS[name]().save(tmp_path / "model")
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755
    assert all(one.stat().st_mode & 0o777 == 0o644 for one in (tmp_path / "model").iterdir())

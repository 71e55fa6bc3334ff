# SPDX-License-Identifier: Apache-2.0
"""A policy small enough to train in a test, rows to train it on, and a trainer that keeps quiet."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from tts_align.data.datamodule import AlignData
from tts_align.data.manifest import write_manifest
from tts_align.data.records import Row
from tts_align.models.policy.qwen2 import LoRA, Qwen2CodecLM, Sizes
from tts_align.models.reward.config import RewardSizes
from tts_align.models.reward.model import RewardModel
from tts_align.objectives import DPO, KTO, SFT, TKTO, Objective, Part
from tts_align.training.cache import TokenCache
from tts_align.training.contrast import Contrast
from tts_align.training.module import AlignModule

CODES, LETTERS = 20, "abcdefgh "
SIZES = Sizes(CODES, len(LETTERS), hidden_size=16, layers=2, heads=2, key_value_heads=1, intermediate_size=24)
REWARD_SIZES = {"width": 8, "layers": 1, "heads": 2, "feed_forward": 12, "decoder_layers": 1}
LORA = LoRA(rank=2, alpha=4)
OBJECTIVES = {"sft": SFT, "dpo": DPO, "kto": KTO, "tkto": TKTO}


def make_reward(seed: int = 0, **sizes: Any) -> RewardModel:
    """A reward model of random weights over the policy's speech tokens and letters, with dropout."""
    torch.manual_seed(seed)
    return RewardModel(sizes=RewardSizes(CODES, LETTERS, **(REWARD_SIZES | {"dropout": 0.2} | sizes)))


def save_tokenizer(folder: Path) -> Path:
    """One token per letter."""
    tokenizer = Tokenizer(WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token=LETTERS[-1]))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def save_policy(directory: Path, seed: int = 0, **sizes: Any) -> Path:
    """Write a directory that holds a policy of random weights, large enough to disagree with each other."""
    tokenizer = save_tokenizer(directory.parent)
    torch.manual_seed(seed)
    model = Qwen2CodecLM(sizes=Sizes(**{**vars(SIZES), **sizes}), tokenizer=str(tokenizer))
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.normal_(std=0.3)
    model.save(directory)
    return directory


def make_rows(sentences: int = 8, per_side: tuple[int, int] = (1, 1), longest: int = 9, seed: int = 0) -> list[Row]:
    """Labelled rows: of each sentence so many desirable and so many undesirable ones."""
    random = np.random.default_rng(seed)
    return [
        Row(
            id=f"{sentence}-{'ba'[desirable]}-{number}",
            text=LETTERS[sentence % 8] * (1 + sentence % 3) + LETTERS[sentence // 8],
            speech=tuple(random.integers(0, CODES, random.integers(3, longest)).tolist()),
            desirable=desirable,
        )
        for sentence in range(sentences)
        for desirable, count in zip((True, False), per_side, strict=True)
        for number in range(count)
    ]


def save_rows(folder: Path, rows: Sequence[Row] | None = None, name: str = "rows.jsonl") -> str:
    """Write a manifest and give its path."""
    return str(write_manifest(make_rows() if rows is None else rows, folder / name))


def build(
    objective: Objective,
    directory: Path,
    manifest: str,
    cache: Path,
    lora: LoRA | None = None,
    lr: float = 0.1,
    optimizer: Any = torch.optim.SGD,
    bistream: tuple[int, int] = (5, 15),
    parts: Mapping[str, Any] | None = None,
    **data: Any,
) -> tuple[AlignModule, AlignData]:
    """A module and its data, as a recipe would build them; token-level KTO gets random log-ratios for weights."""
    torch.manual_seed(1)  # of the adapters
    policy = Qwen2CodecLM(str(directory), lora=lora, bistream=bistream)
    datamodule = AlignData(manifest, **({"rows_per_step": 8} | data))
    contrast = None
    if Part.CONTRAST in objective.needs:
        datamodule.prepare(policy, objective.rows_wanted)
        contrast = Contrast(weights=str(save_log_ratios(datamodule, policy, cache).path))
    module = AlignModule(
        objective,
        policy,
        contrast=contrast,
        cache=str(cache),
        optimizer=functools.partial(optimizer, lr=lr),
        **(parts or {}),
    )
    return module, datamodule


def save_log_ratios(data: AlignData, policy: Qwen2CodecLM, folder: Path) -> TokenCache:
    """Random log π⁺ − log π⁻ of every row, some of them beyond the clamp."""
    cache = TokenCache(folder, "contrast", {"made": "up"})
    for key, row in data.rows().items():
        random = np.random.default_rng(int(key, 16))
        cache.numbers[key] = random.normal(0, 2, policy.layout.target_count(row)).astype(np.float32)
    cache.save()
    return cache


class Memory(DummyLogger):
    """Keeps what is logged: a dictionary of numbers for each step."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append((int(step or 0), dict(metrics)))


def make_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    """Lightning's trainer on the CPU, silent."""
    quiet = {
        "accelerator": "cpu",
        "logger": Memory(),
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "max_epochs": 1,
    }
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **(quiet | options))


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of what trains."""
    return {name: value.detach().clone() for name, value in module.named_parameters() if value.requires_grad}


def gap(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference between two sets of weights."""
    assert one.keys() == other.keys()
    return max(float((value.double() - other[name].double()).abs().max()) for name, value in one.items())


def save_recipe(folder: Path, objective: Any, policy: Path, manifest: str, **changes: Any) -> str:
    """Write a recipe of few steps; ``changes`` are dotted keys with ``__`` for the dot."""
    recipe: dict[str, Any] = {
        "objective": objective,
        "model": {
            "policy": {"class_path": "Qwen2CodecLM", "init_args": {"directory": str(policy)}},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        },
        "data": {"manifest": manifest, "rows_per_step": 4},
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False, "log_every_n_steps": 1},
        "run": {"test_after_fit": False, "directory": str(folder / "run")},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        node = recipe
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def checkpoint_weights(run: Path) -> dict[str, torch.Tensor]:
    """Weights in the last checkpoint of a run's directory."""
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]

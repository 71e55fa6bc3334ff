# SPDX-License-Identifier: Apache-2.0
"""The command ``fit`` as a function, for notebooks and scripts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tts_align.cli.entry import run

if TYPE_CHECKING:
    from tts_align.cli.lightning import AlignCLI


def fit(*recipes: str | Path, **overrides: Any) -> AlignCLI:
    """Do what ``tts-align fit`` does with these recipes, in this process.

    The same without a recipe is three lines; what the data must bring follows the objective::

        module = AlignModule(DPO(beta=0.1), Qwen2CodecLM("policy/"))
        data = AlignData("preferences.jsonl", rows_per_step=32)
        Trainer(max_epochs=1, gradient_clip_val=1.0).fit(module, data)

    Args:
        recipes: YAML files, later ones over earlier ones.
        overrides: options over the recipes; two underscores stand for a dot.

    Returns:
        What was built and trained: ``model``, ``datamodule``, ``trainer``, and ``run``, whose ``directory`` holds the
        rest.

    Example:
        >>> fitted = fit("recipes/dpo.yaml", trainer__max_steps=10, objective__beta=0.2)  # doctest: +SKIP
        >>> fitted.trainer.callback_metrics["train/loss"]  # doctest: +SKIP
        tensor(0.6931)
    """
    named = [part for recipe in recipes for part in ("--config", str(recipe))]
    return run(["fit", *named, *_flags(overrides)])


def _flags(overrides: Mapping[str, Any]) -> Iterator[str]:
    """Options as the command line has them.

    >>> list(_flags({"trainer__max_steps": 10, "model__test": None, "data__manifest": "rows.jsonl"}))
    ['--trainer.max_steps=10', '--model.test=null', '--data.manifest=rows.jsonl']
    """
    for name, value in overrides.items():
        plain = str(value) if isinstance(value, str | Path) else json.dumps(value)
        yield f"--{name.replace('__', '.')}={plain}"

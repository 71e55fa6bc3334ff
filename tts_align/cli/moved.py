# SPDX-License-Identifier: Apache-2.0
"""Names that earlier versions wrote into recipes, and what they are called now."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MOVED = {
    "callbacks.guards": "training.callbacks.guards",
    "callbacks.tokens": "training.callbacks.tokens",
    "contrast": "training.contrast",
    "evaluation": "evaluation.settings",
    "judges.ctc": "evaluation.judges.ctc",
    "judges.symbolic": "evaluation.judges.symbolic",
    "models.base": "models.base.generation",
    "models.cosyvoice.flow": "models.cosyvoice.flow.model",
    "models.dit": "models.flow.dit",
    "models.flow": "models.flow.token_flow",
    "models.flow_vocoder": "models.flow.vocoder",
    "models.fsq": "models.codec.mel_fsq",
    "models.mel": "models.codec.mel",
    "models.qwen2": "models.policy.qwen2",
    "models.reward": "models.reward.model",
    "models.reward_sizes": "models.reward.config",
    "models.s3": "models.cosyvoice.s3.tokenizer",
    "reward_fit": "training.settings",
    "stage_fit": "training.settings",
}
"""Modules of classes that a recipe may name, before version 0.2 and now; the classes keep their names."""

APART = {"models.mel.MelVocoder": "models.codec.vocoder"}
"""Classes that have left the rest of their module."""

RENAMED = {("sizes", "codes"): ("sizes", "codebook_size")}
"""Last two parts of a dotted key, before version 0.2 and now."""


GONE = {("init_args", "packed"): "rows are scored without padding, whatever it says"}
"""Last two parts of a dotted key that has no effect any more, and why."""


def new_path(path: str) -> str | None:
    """Import path of a class today, if it is an import path of an earlier version.

    >>> new_path("tts_align.models.qwen2.Qwen2CodecLM")
    'tts_align.models.policy.qwen2.Qwen2CodecLM'
    """
    module, _, name = path.rpartition(".")
    old = module.removeprefix("tts_align.")
    new = APART.get(f"{old}.{name}", MOVED.get(old))
    return f"tts_align.{new}.{name}" if new and module.startswith("tts_align.") and name[:1].isupper() else None


def new_key(key: str) -> str | None:
    """A dotted key as it is called today, if it is one of an earlier version.

    >>> new_key("model.reward.init_args.sizes.codes")
    'model.reward.init_args.sizes.codebook_size'
    """
    parts = key.split(".")
    new = RENAMED.get((parts[-2], parts[-1])) if len(parts) > 1 else None
    return ".".join([*parts[:-2], *new]) if new else None


def gone(key: str) -> str | None:
    """Why a dotted key is not there any more, if it was there in an earlier version.

    >>> gone("model.policy.init_args.packed")
    'rows are scored without padding, whatever it says'
    """
    parts = key.split(".")
    return GONE.get((parts[-2], parts[-1])) if len(parts) > 1 else None


def outdated(node: Any, key: str = "") -> Iterator[str]:
    """A line for everything in a recipe that has another name now.

    Args:
        node: the recipe, or a part of it.
        key: dotted key of the part.
    """
    if isinstance(node, dict):
        for name, value in node.items():
            inside = f"{key}.{name}" if key else str(name)
            if new := new_key(inside):
                yield f"{inside} is now {new}"
            elif why := gone(inside):
                yield f"{inside} is no longer there, leave it out: {why}"
            yield from outdated(value, inside)
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from outdated(value, f"{key}[{number}]")
    elif isinstance(node, str) and (new := new_path(node)):
        yield f"{key}: {node} is now {new}"

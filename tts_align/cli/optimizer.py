# SPDX-License-Identifier: Apache-2.0
"""An optimiser that a recipe names has its own defaults, not those of AdamW, which the parser begins with."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch


def own_defaults(args: Sequence[str], recipes: Mapping[int, Any]) -> list[str]:
    """A command line that gives an optimiser its own defaults: the parser begins with AdamW's, and would keep them.

    Args:
        args: with everything short written out.
        recipes: of the command line, by their place on it.
    """
    named, given = _optimizer(args, recipes)
    try:
        module, _, name = named.rpartition(".")
        kind = getattr(importlib.import_module(module or "torch.optim"), name)
        own, inherited = (inspect.signature(one).parameters for one in (kind, torch.optim.AdamW))
    except (AttributeError, ImportError, TypeError, ValueError):
        return list(args)  # for check_classes to complain about
    added = {
        key: one.default
        for key, one in own.items()
        if key in inherited and key not in given and one.default is not one.empty
    }
    return [*args, *(f"--model.optimizer.init_args.{key}={json.dumps(value)}" for key, value in added.items())]


def _optimizer(args: Sequence[str], recipes: Mapping[int, Any]) -> tuple[str, set[str]]:
    """The class of the optimiser that recipes and flags name last, and the names of the arguments that they set."""
    named, given = "", set[str]()
    for at, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        value = value if equals else args[at + 1] if at + 1 < len(args) else ""
        if flag in ("--model.optimizer", "--model.optimizer.class_path"):
            named = named if value.lstrip().startswith("{") else value
        elif flag.startswith("--model.optimizer."):
            given.add(flag.rpartition(".")[2])
        elif at in recipes:
            recipe = recipes[at]
            model = recipe.get("model") if isinstance(recipe, dict) else None
            optimizer = model.get("optimizer") if isinstance(model, dict) else None
            if isinstance(optimizer, str):
                named = optimizer
            elif isinstance(optimizer, dict):
                named, inside = str(optimizer.get("class_path") or named), optimizer.get("init_args")
                given |= {*optimizer, *(inside if isinstance(inside, dict) else {})}
    return named, given
